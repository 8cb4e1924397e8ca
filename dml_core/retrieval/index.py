"""Search by inner product in a Faiss index: build, write, read, and rank exactly.

Faiss adds up in float32, by an order that depends on how many queries come at once, and leaves open which of two equal
items comes first. So it returns more candidates than are needed; those are scored anew in float64 from the stored
vectors, and more are fetched until no other item can belong to the k best. A `flat` index then ranks as
`neighbors.nearest` does in float64, ties by position, however the items are dealt to shards. `ivf` and `hnsw` rank what
they find in the same way.

On a GPU: the cells of `ivf` are trained there where Faiss's build sees one. An index that many queries ask is copied
there by `copy_to_gpu`, a flat one for torch, `ivf` for Faiss: what they find is scored anew all the same.

Legend: Q queries, D dimensions, k neighbours.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from dml_core.retrieval.neighbors import Neighbors, nearest

EXTRA_CANDIDATES = 16  # beyond k, in the first search
CHUNK = 2**22  # numbers: the vectors of the candidates of a chunk of queries
UNIT_ROUNDOFF = 2**-24  # of float32, relative
LARGEST_ON_GPU = 2048  # neighbours, and cells of a query, that Faiss's GPU indexes allow
LARGEST_NORM = math.sqrt(2)  # of stored vectors: 1 for unit embeddings, at most this for index_vectors of them


class IndexOptions(NamedTuple):
    """Options of approximate indexes; None: the default.

    Attributes:
        nlist: Cells of ivf.
        nprobe: Cells of ivf that a query searches.
        links: Links of each item of hnsw.
        ef_search: Candidates that a query keeps on its way through hnsw.
    """

    nlist: int | None = None
    nprobe: int | None = None
    links: int | None = None
    ef_search: int | None = None


# Kind of index -> its options.
KINDS: dict[str, tuple[str, ...]] = {"flat": (), "ivf": ("nlist", "nprobe"), "hnsw": ("links", "ef_search")}


def default_cells(rows: int) -> int:
    """Return how many cells ivf has by default.

    sqrt(rows), where comparing a query with all centres costs as much as with the items of a cell; fewer where k-means
    would have less than the 39 items a cell that Faiss asks for.
    """
    return max(1, min(round(math.sqrt(rows)), rows // 39))


def build(vectors: Any, kind: str, options: IndexOptions) -> Any:
    """Build a Faiss index, with the same bits each time on one thread; where `gpu_count` is not 0, GPUs train ivf.

    Args:
        vectors: (N, D) array or tensor.
        kind: flat compares a query with every item, ivf with those of the cells around it; hnsw walks along a graph of
            near items.
        options: Options of the kind, as KINDS names them.

    Returns:
        The Faiss index, of the processor.
    """
    import faiss

    vectors = np.ascontiguousarray(vectors, np.float32)
    rows, dim = vectors.shape
    index: Any
    if kind == "flat":
        index = faiss.IndexFlatIP(dim)
    elif kind == "ivf":
        cells = options.nlist or default_cells(rows)
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, cells, faiss.METRIC_INNER_PRODUCT)
        if gpu_count():  # they compare points with centres, the processor does the rest of k-means
            index.clustering_index = on_gpus = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(dim))
        index.train(vectors)
        if gpu_count():
            index.clustering_index = None
            del on_gpus
        # An eighth of the cells, a sixth of the time: 97% recall in classes of a hundred items, structure-aware 95%,
        # where a sixteenth misses twice as much. Never fewer than eight: the cells of small sets hold few items.
        index.nprobe = min(cells, options.nprobe or max(8, cells // 8))
    else:
        # Measured on 200,000 items in classes of ten, which are hard: 32 links and 128 candidates find 93%, half the
        # links 76%, a quarter of the candidates 83%.
        index = faiss.IndexHNSWFlat(dim, options.links or 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efSearch = options.ef_search or 128
    index.add(vectors)
    return index


def gpu_count() -> int:
    """Return how many GPUs Faiss sees; 0 where its build knows none."""
    import faiss

    return faiss.get_num_gpus()


def write(index: Any, path: str) -> None:
    """Write a Faiss index to a file."""
    import faiss

    faiss.write_index(index, path)


def open_mapped(path: str) -> Any:
    """Open a Faiss index as a memory map: vectors, cells and links stay in the file, and are read on use."""
    import faiss

    return faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)


class VectorsOnDevice:
    """The vectors of a flat index on a device, searched exactly by neighbors.nearest. `search` takes it as an index."""

    def __init__(self, index: Any, device: torch.device):
        """Copy the vectors of a flat Faiss index."""
        vectors = np.empty((index.ntotal, index.d), np.float32)
        index.reconstruct_n(0, index.ntotal, vectors)  # with faiss.contrib.torch_utils it would return a tensor
        self.vectors = torch.from_numpy(vectors).to(device)
        self.ntotal, self.d = index.ntotal, index.d

    def search_and_reconstruct(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return similarity (Q, k), position (Q, k) and vectors (Q, k, D) of the k best items of queries (Q, D)."""
        best = nearest(torch.from_numpy(queries).to(self.vectors.device), [(0, self.vectors)], k)
        stored = self.vectors[best.position]
        return best.similarity.cpu().numpy(), best.position.cpu().numpy(), stored.cpu().numpy()


class IvfOnGpus:
    """An ivf index copied to all GPUs that Faiss sees, which find what is read from the original. As for `search`."""

    def __init__(self, index: Any):
        """Copy an ivf index."""
        import faiss

        self.original, self.copy = index, faiss.index_cpu_to_all_gpus(index)
        index.make_direct_map()  # from positions to places in cells
        self.ntotal, self.d = index.ntotal, index.d

    def search_and_reconstruct(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return similarity (Q, k), position (Q, k) and vectors (Q, k, D) of the k best items of queries (Q, D)."""
        if k > LARGEST_ON_GPU:
            return self.original.search_and_reconstruct(queries, k)
        similarity, position = self.copy.search(queries, k)
        stored = self.original.reconstruct_batch(position.clip(0).ravel()).reshape(*position.shape, self.d)
        return similarity, position, stored


def copy_to_gpu(index: Any, kind: str) -> Any:
    """Copy an index to where many queries are answered soonest.

    Args:
        index: A Faiss index.
        kind: Of KINDS.

    Returns:
        A copy for `search` on the GPU; the index itself where there is none for its kind, or too little memory.
    """
    if kind == "flat" and torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
        if 8 * index.ntotal * index.d <= free:  # as much again is left
            return VectorsOnDevice(index, torch.device("cuda"))
    if kind == "ivf" and gpu_count() and index.nprobe <= LARGEST_ON_GPU:
        return IvfOnGpus(index)
    return index


def search(index: Any, queries: Any, k: int) -> Neighbors:
    """Find the k items of greatest inner product with each query.

    Args:
        index: A Faiss index, or a copy of one by `copy_to_gpu`.
        queries: (Q, D) array or tensor.
        k: How many neighbours a query gets.

    Returns:
        The neighbours (Q, k), best first, ties by position; similarity is float64. Empty places hold -inf and -1.

    Raises:
        ValueError: Queries are of another shape or not finite, or k < 1.
    """
    queries = checked_queries("queries", queries, index.d, k).numpy()
    similarity, position = np.full((len(queries), k), -np.inf), np.full((len(queries), k), -1)
    undecided, candidates = np.arange(len(queries)), k + EXTRA_CANDIDATES
    while len(undecided):
        candidates = min(candidates, index.ntotal)
        rows = max(1, CHUNK // (candidates * index.d))
        still_undecided = []
        for chunk in np.split(undecided, range(rows, len(undecided), rows)):
            decided, best_score, best_position = _search_once(index, queries[chunk], k, candidates)
            columns = best_score.shape[1]
            similarity[chunk, :columns], position[chunk, :columns] = best_score, best_position
            still_undecided.append(chunk[~decided])
        undecided, candidates = np.concatenate(still_undecided), 2 * candidates
    return Neighbors(torch.from_numpy(similarity), torch.from_numpy(position))


def checked_queries(name: str, queries: Any, dim: int, k: int = 1) -> torch.Tensor:
    """Return queries as float32 on the processor; Faiss answers what is not finite with ordinary positions, or none.

    Args:
        name: Of the argument, for messages.
        queries: Array or tensor, which is to be (Q, dim).
        dim: Numbers in a vector of the index.
        k: How many neighbours are asked for.

    Raises:
        ValueError: They are of another shape or not finite, or k < 1.
    """
    if k < 1:
        raise ValueError(f"k={k}: at least one neighbour is needed")
    vectors = torch.as_tensor(queries).detach().to("cpu", torch.float32).contiguous()
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        hint = f"; one query is {name}[None]" if vectors.shape == (dim,) else ""
        raise ValueError(f"{name}: shape {tuple(vectors.shape)}, but the index needs (Q, {dim}){hint}")
    broken = (~vectors.isfinite().all(1)).nonzero()[:, 0]
    if len(broken):
        raise ValueError(
            f"{name}: {len(broken)} of {len(vectors)} rows are not finite in float32, row {broken[0]} first"
        )
    return vectors


def _search_once(index: Any, queries: np.ndarray, k: int, candidates: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rank so many candidates of each query.

    Returns:
        (Q,) whether no other item can be among the k best, and the similarity and position of the k best candidates.
    """
    rough, position, stored = index.search_and_reconstruct(queries, candidates)
    # The sum over a row of its own: equal vectors have equal scores, which a matrix product does not promise.
    score = (queries[:, None].astype(np.float64) * stored).sum(2)
    score[position < 0] = -np.inf
    order = np.lexsort((position, -score), axis=-1)[:, :k]
    error = UNIT_ROUNDOFF * index.d * LARGEST_NORM * np.linalg.norm(queries, axis=1)
    decided = (position[:, -1] < 0) | (rough[:, -1] + error < rough[:, min(k, candidates) - 1] - error)
    if candidates == index.ntotal:
        decided[:] = True
    return decided, np.take_along_axis(score, order, 1), np.take_along_axis(position, order, 1)


def merge_shards(shards: Sequence[Neighbors], offsets: Sequence[int], k: int) -> Neighbors:
    """Merge the neighbours in the shards of a gallery.

    Args:
        shards: The neighbours in each shard, by position in it.
        offsets: Ascending gallery positions at which the shards begin.
        k: How many neighbours a query gets.

    Returns:
        The k best by position in the gallery, ties by position.
    """
    similarity = torch.cat([shard.similarity for shard in shards], 1)
    position = torch.cat(
        [torch.where(s.position < 0, -1, s.position + offset) for s, offset in zip(shards, offsets, strict=True)], 1
    )
    similarity, order = similarity.sort(dim=1, descending=True, stable=True)
    return Neighbors(similarity[:, :k], position.gather(1, order[:, :k]))
