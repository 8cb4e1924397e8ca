from collections.abc import Callable
from pathlib import Path

import faiss
import psutil
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dml_core.retrieval import index
from dml_core.retrieval.index import KINDS, IndexOptions, build, default_cells, merge_shards, open_mapped, search, write
from dml_core.retrieval.neighbors import Neighbors, nearest
from dml_core.retrieval.structure import index_vectors, query_vectors
from tests.dml_core.retrieval.gpu_way import search_as_a_gpu


@pytest.fixture(autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


def clustered(rows: int, dim: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(20, dim, generator=torch.Generator().manual_seed(1))
    return normalize(centers[torch.arange(rows) % 20] + 0.5 * torch.randn(rows, dim, generator=generator))


def signs(rows: int, dim: int = 16, seed: int = 0) -> Tensor:
    """Of unit length; most inner products tie, and many rows are the same."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, (rows, dim), generator=generator).float() * 2 - 1) / dim**0.5


def in_shards(gallery: Tensor, query: Tensor, k: int, count: int) -> Neighbors:
    parts = gallery.tensor_split(count)
    offsets = [sum(map(len, parts[:i])) for i in range(count)]
    return merge_shards([search(build(part, "flat", IndexOptions()), query, k) for part in parts], offsets, k)


@pytest.mark.parametrize("k", [1, 10, 700])
@pytest.mark.parametrize("make", [clustered, signs])
@pytest.mark.parametrize("aware", [False, True])
def test_flat_is_the_exact_ranking_in_any_number_of_shards(k: int, make, aware: bool) -> None:
    gallery, query = make(600), make(40, seed=2)
    if aware:
        s = 0.5 + torch.randint(0, 5, query.shape, generator=torch.Generator().manual_seed(3)) / 4
        gallery, query = index_vectors(gallery), query_vectors(query, s)
    expected = nearest(query.double(), [(0, gallery.double())], k)
    for count in (1, 3, 7):
        best = in_shards(gallery, query, k, count)
        assert torch.equal(best.position, expected.position)
        torch.testing.assert_close(best.similarity, expected.similarity, rtol=1e-12, atol=1e-12)


def test_more_equals_than_candidates_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "CHUNK", 2000)  # one query at a time
    gallery = clustered(500)
    gallery[40:400:3] = gallery[7]
    best = search(build(gallery, "flat", IndexOptions()), gallery[[7, 0, 1]], 5)
    assert best.position[0].tolist() == [7, 40, 43, 46, 49] and best.position[1:, 0].tolist() == [0, 1]


def test_approximate_kinds_find_nearly_all() -> None:
    gallery, query = clustered(5000), clustered(100, seed=2)
    exact = search(build(gallery, "flat", IndexOptions()), query, 10)
    for kind in ("ivf", "hnsw"):
        best = search(build(gallery, kind, IndexOptions()), query, 10)
        share = (best.position[:, :, None] == exact.position[:, None]).any(2).double().mean()
        assert share > 0.95, kind
        assert (best.similarity.diff(dim=1) <= 0).all()
    everywhere = search(build(gallery, "ivf", IndexOptions(nlist=20, nprobe=20)), query, 10)
    assert torch.equal(everywhere.position, exact.position)


def test_a_cell_with_less_than_is_wanted_leaves_places_empty() -> None:
    gallery = clustered(200)
    best = search(build(gallery, "ivf", IndexOptions(nlist=20, nprobe=1)), gallery[:5], 150)
    empty = best.position == -1
    assert empty.any(1).all() and (best.similarity[empty] == -torch.inf).all() and not empty[:, 0].any()
    together = merge_shards([best, best], [0, 200], 150)
    assert torch.equal(together.position[:, :2], torch.stack([best.position[:, 0], best.position[:, 0] + 200], 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5])
def test_tiny_sets(kind: str, rows: int) -> None:
    gallery = clustered(rows)
    best = search(build(gallery, kind, IndexOptions()), gallery, rows + 2)
    assert best.position[:, 0].tolist() == [*range(rows)] and (best.position[:, rows:] == -1).all()
    assert default_cells(rows) == 1 and default_cells(200_000) == 447


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_file_each_time(kind: str, tmp_path: Path) -> None:
    for name in ("once", "twice"):
        write(build(clustered(1000), kind, IndexOptions()), str(tmp_path / name))
    assert (tmp_path / "once").read_bytes() == (tmp_path / "twice").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_mapped(kind: str, tmp_path: Path) -> None:
    """Opening 8 MiB of vectors takes little memory of one's own, and the file is among the process's maps."""
    gallery, query = clustered(2000, 1024), clustered(20, 1024, seed=2)
    built, path = build(gallery, kind, IndexOptions()), str(tmp_path / "shard")
    write(built, path)
    before = psutil.Process().memory_full_info().uss
    opened = open_mapped(path)
    assert psutil.Process().memory_full_info().uss - before < 4 * 2**20
    assert path in {entry.path for entry in psutil.Process().memory_maps()}
    for expected, result in zip(search(built, query, 10), search(opened, query, 10), strict=True):
        assert torch.equal(expected, result)


def test_a_flat_index_on_a_device_answers_the_same() -> None:
    """Also where something has imported what makes Faiss take and return tensors, for the whole process."""
    import faiss.contrib.torch_utils  # noqa: F401, as pytorch-metric-learning's inference does

    gallery, query = torch.cat([clustered(900), signs(300)]), torch.cat([clustered(30, seed=2), signs(9, seed=2)])
    built = build(gallery, "flat", IndexOptions())
    copy = index.VectorsOnDevice(built, torch.device("cpu"))
    for k in (1, 10, 1300):
        expected = search(built, query, k)
        with search_as_a_gpu():
            found = search(copy, query, k)
        assert torch.equal(found.similarity, expected.similarity) and torch.equal(found.position, expected.position)
    assert index.copy_to_gpu(built, "hnsw") is built


def test_gpus_of_faiss_train_and_search_the_same_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With Faiss's own copies of an index in this process in place of those on GPUs, which have its interface."""
    gallery, query = clustered(2000), clustered(50, seed=2)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    write(build(gallery, "ivf", IndexOptions(nprobe=3)), str(tmp_path / "processor"))
    copied = []

    def copy(original: faiss.Index) -> faiss.Index:
        copied.append(type(original))
        return faiss.clone_index(original)

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", copy)
    monkeypatch.setattr(index, "LARGEST_ON_GPU", 40)
    write(build(gallery, "ivf", IndexOptions(nprobe=3)), str(tmp_path / "gpus"))
    assert (tmp_path / "gpus").read_bytes() == (tmp_path / "processor").read_bytes()
    opened = open_mapped(str(tmp_path / "gpus"))
    on_gpus = index.copy_to_gpu(opened, "ivf")
    assert isinstance(on_gpus, index.IvfOnGpus) and copied == [faiss.IndexFlatIP, faiss.IndexIVFFlat]
    for k in (1, 10, 300):
        found, expected = search(on_gpus, query, k), search(opened, query, k)
        assert torch.equal(found.similarity, expected.similarity) and torch.equal(found.position, expected.position)


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
@pytest.mark.parametrize(
    ("change", "k", "message"),
    [
        (lambda q: q.index_fill(0, torch.tensor([3]), torch.nan), 5, "1 of 9 rows are not finite .* row 3 first"),
        (lambda q: q.index_fill(0, torch.tensor([1, 2]), torch.inf), 5, "2 of 9 rows are not finite"),
        (lambda q: q.double() * 1e300, 5, "9 of 9 rows are not finite in float32"),
        (lambda q: q[:, :7], 5, r"shape \(9, 7\), but the index needs \(Q, 8\)$"),
        (lambda q: q[0], 5, r"shape \(8,\), but the index needs \(Q, 8\); one query is queries\[None\]"),
        (lambda q: q[None], 5, r"shape \(1, 9, 8\), but"),
        (lambda q: q, 0, "k=0: at least one neighbour"),
        (lambda q: q, -2, "k=-2: at least one neighbour"),
    ],
)  # fmt: skip
def test_bad_queries_are_refused(kind: str, change: Callable[[Tensor], Tensor], k: int, message: str) -> None:
    z = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=message):
        search(build(z, kind, IndexOptions()), change(z[:9].clone()), k)
