"""Against the search that multiplies every pair twice."""

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dml_core import gather
from dml_core.retrieval import mutual, neighbors
from dml_core.retrieval.mutual import mutual_neighbors
from dml_core.retrieval.neighbors import BLOCK, GALLERY_BLOCK, block_rows, gallery_blocks, nearest, owned_rows
from tests import ranks

SIZES = [1, 2, BLOCK - 1, BLOCK + 1, 3 * BLOCK, GALLERY_BLOCK, GALLERY_BLOCK + 1, 2 * GALLERY_BLOCK + 700]


def points(size: int, ties: bool) -> Tensor:
    """Unit vectors; with ties corners of a cube, whose inner products are exact and nearly all equal to others."""
    generator = torch.Generator().manual_seed(size)
    if ties:
        return torch.randint(0, 2, (size, 16), generator=generator).float() / 2 - 0.25
    return F.normalize(torch.randn(size, 12, generator=generator, dtype=torch.float64), dim=1)


def among_each_other(z: Tensor, depth: list[int], rank: int = 0, world: int = 1) -> list[neighbors.Neighbors]:
    rows, shard = block_rows(len(z)), z[owned_rows(len(z), rank, world)]
    blocks = shard.split(rows) if len(shard) else ()
    return mutual_neighbors(blocks, gallery_blocks(shard, len(z), rank, world), depth, rows, rank, world)


def depths(size: int) -> list[int]:
    """Another number of neighbours for each block."""
    return [min(size, 1 + 40 * (block % 3)) for block in range(-(-size // block_rows(size)))]


@functools.cache
def search_alone(size: int, ties: bool) -> list[neighbors.Neighbors]:
    """What one process finds; several tests ask."""
    return among_each_other(points(size, ties), depths(size))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_equal_to_the_search_of_all_pairs(size: int, ties: bool) -> None:
    z, rows = points(size, ties), block_rows(size)
    blocks = [(i * GALLERY_BLOCK, block) for i, block in enumerate(z.split(GALLERY_BLOCK))]
    for number, best in enumerate(search_alone(size, ties)):
        rows_of_block = torch.arange(number * rows, min(size, (number + 1) * rows))
        expected = nearest(z[rows_of_block], blocks, depths(size)[number], rows_of_block)
        torch.testing.assert_close(best.similarity, expected.similarity, rtol=1e-12, atol=1e-12)
        assert torch.equal(best.position, expected.position)


def test_each_pair_of_blocks_is_multiplied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    size, cells, product = 2 * GALLERY_BLOCK, 0, torch.mm

    def counted(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        nonlocal cells
        cells += out.numel()
        return product(a, b, out=out)

    monkeypatch.setattr(mutual.torch, "mm", counted)
    among_each_other(points(size, False), depths(size))
    count = size // block_rows(size)
    assert cells == count * (count + 1) // 2 * block_rows(size) ** 2


def search_in_group(folder: Path) -> None:
    rank, world = gather.rank(), gather.world_size()
    results = {
        (size, ties): among_each_other(points(size, ties), depths(size), rank, world)
        for size in SIZES
        for ties in (False, True)
    }
    torch.save({key: [tuple(block) for block in blocks] for key, blocks in results.items()}, folder / f"{rank}")


@pytest.mark.parametrize("world", [2, 3])
def test_processes_find_the_same_bits(world: int, tmp_path: Path) -> None:
    ranks.run(search_in_group, world, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}") for rank in range(world)]
    for size in SIZES:
        for ties in (False, True):
            for number, alone in enumerate(search_alone(size, ties)):
                similarity, position = parts[number % world][size, ties][number // world]
                assert torch.equal(similarity, alone.similarity)
                assert torch.equal(position, alone.position)
