"""The search of a GPU, on the processor: against a stable sort, and what it does not do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dml_core.retrieval import full_list, neighbors, topk
from dml_core.retrieval.neighbors import BLOCK, Neighbors, Tiles, block_rows, gallery_blocks, nearest, similarities
from tests.dml_core.retrieval.gpu_way import SMALL_TILES, search_as_a_gpu
from tests.dml_core.retrieval.test_neighbors import full_sort, normal, signs


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 600), st.booleans(), st.integers(0, 999))
def test_the_best_columns_have_the_greatest_values(rows: int, blocks: int, k: int, ties: bool, seed: int) -> None:
    make, columns = signs if ties else normal, blocks * BLOCK
    similarity = make(rows, 4, seed=seed) @ make(columns, 4, seed=seed + 1).T
    values, column = topk.best_columns(similarity, k)
    assert torch.equal(similarity.gather(1, column), values)
    assert all(len(row.unique()) == min(k, columns) for row in column)
    assert torch.equal(values.sort(1, descending=True).values, similarity.sort(1, descending=True).values[:, :k])


@settings(max_examples=40)
@given(
    st.integers(1, 60),
    st.integers(1, 900),
    st.integers(1, 70),
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(0, 9),
)
def test_any_sizes_any_ties_any_copies(queries: int, size: int, k: int, dim: int, copies: int, seed: int) -> None:
    """Corners of a small cube, and rows that come many times: more of them tie than are kept."""
    query, gallery = (
        signs(queries, dim, seed=seed),
        signs(-(-size // copies), dim, seed=seed + 1).repeat(copies, 1)[:size],
    )
    own = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:queries]
    with search_as_a_gpu(Tiles(BLOCK, BLOCK, by_topk=True)):
        best = nearest(query, [(0, gallery)], k)
        others = nearest(gallery[own], [(0, gallery)], k, own)
    for result, expected in ((best, full_sort(query, gallery, k)), (others, full_sort(gallery[own], gallery, k, own))):
        assert torch.equal(result.similarity, expected[0]) and torch.equal(result.position, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 10, 2000])
def test_equal_to_the_search_of_a_processor(k: int, dtype: torch.dtype) -> None:
    gallery = torch.cat([normal(1500, 12).to(dtype), signs(400, 12).to(dtype)])
    own = torch.randperm(len(gallery), generator=torch.Generator().manual_seed(1))[:100]
    expected = nearest(gallery[own], [(0, gallery)], k, own)
    with search_as_a_gpu():
        best = nearest(gallery[own], [(0, gallery)], k, own)
    torch.testing.assert_close(best.similarity, expected.similarity, rtol=1e-5, atol=1e-6)
    if dtype == torch.float64:  # float32 may round the products of other shapes in another way, and order by it
        assert torch.equal(best.position, expected.position)


def count_products(monkeypatch: pytest.MonkeyPatch, queries: Tensor, gallery: Tensor, k: int) -> tuple[Neighbors, int]:
    count, product = [0], torch.mm

    def counted(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        count[0] += 1
        return product(a, b, out=out)

    monkeypatch.setattr(neighbors.torch, "mm", counted)
    with search_as_a_gpu():
        return nearest(queries, [(0, gallery)], k), count[0]


def test_only_blocks_with_more_ties_than_are_kept_are_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = -(-3000 // SMALL_TILES.gallery)
    gallery = normal(3000, 16)
    gallery[100 : 99 + topk.SPARE] = gallery[0]  # with these and it, one more place is kept for k = 1
    best, products = count_products(monkeypatch, gallery[: 2 * BLOCK], gallery, 1)
    assert products == 2 * tiles and best.position[:100, 0].tolist() == [*range(100)]
    gallery[2000] = gallery[0]
    best, products = count_products(monkeypatch, gallery[: 2 * BLOCK], gallery, 1)
    assert products == 3 * tiles and best.position[[0, 100, 106, 300], 0].tolist() == [0, 0, 0, 300]


def test_copies_of_one_item_take_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = normal(1, 16).expand(3000, 16).contiguous()
    best, products = count_products(monkeypatch, gallery[:700], gallery, 40)
    assert products == 2 * 3 * -(-3000 // SMALL_TILES.gallery)
    assert (best.position == torch.arange(40)).all()


def test_tf32_is_kept_out_and_allowed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, product = [], torch.mm
    matmul = torch.backends.cuda.matmul

    def watched(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        seen.append((matmul.fp32_precision, matmul.allow_tf32))
        return product(a, b, out=out)

    monkeypatch.setattr(neighbors.torch, "mm", watched)
    z = normal(3, 4)
    try:
        matmul.allow_tf32 = True
        nearest(z, [(0, z)], 1)
        assert matmul.allow_tf32 and matmul.fp32_precision == "tf32" and seen == [("ieee", False)]
    finally:
        matmul.allow_tf32 = False
    nearest(z, [(0, z)], 1)
    assert not matmul.allow_tf32


def test_a_gpu_never_waits_for_the_host_between_tiles() -> None:
    """On tensors that have a device and a shape, but no values that the host could look at."""
    total, k = 300_000, 10
    with FakeTensorMode():
        z = torch.empty(total, 64, device="cuda")
        with pytest.raises(Exception, match="aten"):  # as this does
            bool((z > 0).any())
        rows = block_rows(total)
        blocks, own = z.split(rows)[:2], torch.arange(total, device="cuda").split(rows)[:2]
        kept = [neighbors.empty_neighbors(block, k + topk.SPARE) for block in blocks]
        equal = [neighbors.empty_neighbors(block.double(), k) for block in blocks]
        labels = torch.zeros(total, dtype=torch.long, device="cuda")
        items = [full_list.relevant_positions(label, labels, labels, k) for label in labels.split(rows)[:2]]
        relevant = [
            full_list.sort_relevant(at, block[:, :k], at[:, 0], k) for at, block in zip(items, blocks, strict=True)
        ]
        shapes = []
        for number, offset, similarity in similarities(blocks, gallery_blocks(z, total, 0, 1), own, rows):
            shapes.append(tuple(similarity.shape))
            topk.keep_best(*kept[number], similarity, offset)
            topk.keep_first_equal(*equal[number], similarity, kept[number].similarity[:, k - 1 : k], offset)
            neighbors.fill_scores(relevant[number].similarity, items[number], similarity, offset)
            neighbors.leave_out(similarity, items[number], offset)
            full_list.count_outranking(relevant[number], similarity, offset)
        for block, first in zip(kept, equal, strict=True):
            tied = topk.settle(*block)
            topk.fill_ties(*(x[:, :k] for x in block), *first, tied)
    assert shapes == 2 * [(1024, 2**17)] + 2 * [(1024, 2**17)] + 2 * [(1024, 37_888)]
