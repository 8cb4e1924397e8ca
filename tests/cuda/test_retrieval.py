"""Exact search on a GPU: the processor's neighbours, ties by position, shards, and no wait between tiles."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dml_core import gather
from dml_core.retrieval import index, neighbors
from dml_core.retrieval.metrics import retrieval_metrics, sharded_retrieval_metrics
from dml_core.retrieval.neighbors import nearest, owned_rows
from tests import ranks
from tests.dml_core.retrieval.test_metrics import clustered, structures
from tests.dml_core.retrieval.test_neighbors import normal, signs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("make", [normal, signs], ids=["random", "ties"])
@pytest.mark.parametrize("size", [1, 300, 5000])
@pytest.mark.parametrize("k", [1, 10, 3000])
def test_neighbours_are_those_of_the_processor(make: Callable[..., Tensor], size: int, k: int) -> None:
    gallery = make(size, 16).double()
    own = torch.arange(size)[::7]
    expected = nearest(gallery[own], [(0, gallery)], k, own)
    z, on_gpu = gallery.cuda(), own.cuda()
    best = nearest(z[on_gpu], [(0, z)], k, on_gpu)
    torch.testing.assert_close(best.similarity.cpu(), expected.similarity, rtol=1e-12, atol=1e-12)
    assert torch.equal(best.position.cpu(), expected.position)


def test_copies_are_equally_similar_wherever_they_stand() -> None:
    rows = torch.nn.functional.normalize(torch.randn(50, 96, device="cuda"))
    gallery = rows.repeat(8000, 1)[:300_001]  # several tiles
    best = nearest(rows, [(0, gallery)], 30)
    assert torch.equal(best.position.cpu(), torch.arange(50)[:, None] + 50 * torch.arange(30))


def test_float32_is_not_tf32() -> None:
    z = normal(3000, 512).float()
    expected = z.double() @ z.double().T
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        best = nearest(z.cuda(), [(0, z.cuda())], 5)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    exact = expected.gather(1, best.position.cpu())
    torch.testing.assert_close(best.similarity.cpu().double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("arguments", [{"extra": ("map", "cmc")}, {"rerank": 20}, {"rerank": None}])
@pytest.mark.parametrize("separate", [False, True])
def test_metrics_are_those_of_the_processor(arguments: dict, separate: bool) -> None:
    query, labels = clustered(3000, 60)
    other = clustered(2000, 60, seed=1) if separate else ()
    structure = structures(query) if "rerank" in arguments else None
    expected = retrieval_metrics(query.double(), labels, *other, structure=structure, **arguments)
    on_gpu = [x.cuda() for x in (query.double(), labels, *other)]
    structure = None if structure is None else structure.cuda()
    assert retrieval_metrics(*on_gpu, structure=structure, **arguments) == pytest.approx(expected, abs=1e-9)


def test_the_host_does_not_wait_between_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's own warning of a wait is an error from the first tile to the last, in all searches of the metrics."""
    tiles, made = neighbors.similarities, []

    def watched(*arguments: object) -> Iterator[tuple[int, int, Tensor]]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            for tile in tiles(*arguments):  # type: ignore[arg-type]
                made.append(tile[0])
                yield tile
        finally:
            torch.cuda.set_sync_debug_mode("default")

    query, labels = (x.cuda() for x in clustered(5000, 60))
    structure = structures(query.cpu()).cuda()
    expected = (
        retrieval_metrics(query, labels, extra=("map",)),
        retrieval_metrics(query, labels, structure=structure, rerank=9),
    )
    monkeypatch.setattr(neighbors, "similarities", watched)
    assert retrieval_metrics(query, labels, extra=("map",)) == expected[0]
    assert retrieval_metrics(query, labels, structure=structure, rerank=9) == expected[1]
    copies = query[:1].expand(2000, -1).contiguous()
    assert retrieval_metrics(copies, labels[:2000])["recall_at_1"] >= 0  # takes a second look
    assert len(made) >= 3 * 20


def test_a_million_by_128_fits_in_4_gib() -> None:
    z = torch.randn(2**20, 128, device="cuda")
    labels = torch.arange(len(z), device="cuda") // 10
    torch.cuda.reset_peak_memory_stats()
    whole, neighbors_rows = neighbors.similarities, 8

    def some(queries: Sequence[Tensor], *arguments: object) -> Iterator[tuple[int, int, Tensor]]:
        yield from whole(queries[:neighbors_rows], *arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:  # a few of the queries' blocks take all the memory, in less time
        patch.setattr(neighbors, "similarities", some)
        retrieval_metrics(z, labels)
    assert torch.cuda.max_memory_allocated() < 4 * 2**30


def evaluate_on_gpu(folder: Path) -> None:
    rank, world = gather.rank(), gather.world_size()
    (query, labels), (gallery, targets) = clustered(3000, 60), clustered(2000, 60, seed=1)
    results = []
    for other in (None, (gallery, targets)):
        shards = [z[owned_rows(len(z), rank, world)].cuda() for z in (query, *(other[:1] if other else ()))]
        rest = (shards[1], targets) if other else (None, None)
        results.append(sharded_retrieval_metrics(shards[0], labels, *rest, extra=("map", "cmc")))
    torch.save(results, folder / f"{world}-{rank}")


def test_two_processes_on_one_gpu_give_the_bits_of_one(tmp_path: Path) -> None:
    """Over gloo, which takes tensors of the GPU."""
    for world in (1, 2):
        ranks.run(evaluate_on_gpu, world, tmp_path)
    results = [torch.load(path) for path in tmp_path.iterdir()]
    assert len(results) == 3 and all(result == results[0] for result in results)


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_an_index_on_the_gpu_answers_as_its_file(kind: str, tmp_path: Path) -> None:
    """The cells are trained there too, where Faiss sees the GPU; the file is one of the processor."""
    gallery, query = clustered(20_000, 500)[0], clustered(100, 500, seed=1)[0]
    index.write(index.build(gallery, kind, index.IndexOptions()), str(tmp_path / "shard"))
    opened = index.open_mapped(str(tmp_path / "shard"))
    copy = index.copy_to_gpu(opened, kind)
    assert (copy is opened) == (kind == "ivf" and not index.gpu_count())
    expected, found = index.search(opened, query, 10), index.search(copy, query, 10)
    if kind == "flat":
        assert torch.equal(found.position, expected.position) and torch.equal(found.similarity, expected.similarity)
    else:  # a cell as near as another may be left out
        assert (found.position == expected.position).double().mean() > 0.99
