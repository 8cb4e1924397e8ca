"""Search by inner product in Faiss: built, written, mapped into memory, and ranked exactly.

Faiss adds up in float32, by an order that depends on how many queries come at once, and leaves open which of two equal
items comes first. So it is asked for more candidates than are wanted; those are scored anew in float64 from the vectors
that the index holds, until nothing that was not looked at can belong to the k best. A `flat` index then ranks as
`neighbors.nearest` does in float64, ties by position, however the items are dealt to shards. `ivf` and `hnsw` rank what
they find in the same way.

Legend: Q queries, D dimensions, k neighbours.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from dml_core.retrieval.neighbors import Neighbors

MORE = 16  # candidates beyond the k wanted
CHUNK = 2**22  # numbers: the vectors of the candidates of a chunk of queries
ROUNDING = 2**-24  # of float32, relative
LONGEST = math.sqrt(2)  # norm of what is stored: 1 for unit embeddings, at most this for index_vectors of them


class Options(NamedTuple):
    """Of approximate kinds; None: the default.

    nlist: cells of ivf.  nprobe: cells that a query looks into.  links: of each item of hnsw.  ef_search: candidates
    that a query holds on its way.
    """

    nlist: int | None = None
    nprobe: int | None = None
    links: int | None = None
    ef_search: int | None = None


KINDS: dict[str, tuple[str, ...]] = {"flat": (), "ivf": ("nlist", "nprobe"), "hnsw": ("links", "ef_search")}


def default_cells(rows: int) -> int:
    """sqrt(rows), where comparing a query with all centres costs as much as with the items of a cell; fewer where the
    k-means behind it would have less than the 39 items a cell that Faiss asks for."""
    return max(1, min(round(math.sqrt(rows)), rows // 39))


def build(vectors: Any, kind: str, options: Options) -> Any:
    """A Faiss index of vectors (N, D), an array or tensor. The same bits each time on one thread.

    kind: of KINDS, which name the options that belong to each. flat compares a query with every item; ivf with those of
    the cells around it; hnsw walks along a graph of near items.
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
        index.train(vectors)
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


def write(index: Any, path: str) -> None:
    import faiss

    faiss.write_index(index, path)


def mapped(path: str) -> Any:
    """An index whose vectors, cells and links stay in the file, of which the system keeps in memory what is used."""
    import faiss

    return faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)


def search(index: Any, queries: Any, k: int) -> Neighbors:
    """The k items of greatest inner product with each query (Q, D), best first, ties by position.

    Returns similarity (Q, k) float64 and position (Q, k); places that nothing was found for hold -inf and -1.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    similarity, position = np.full((len(queries), k), -np.inf), np.full((len(queries), k), -1)
    undecided, wanted = np.arange(len(queries)), k + MORE
    while len(undecided):
        wanted = min(wanted, index.ntotal)
        rows = max(1, CHUNK // (wanted * index.d))
        left = []
        for some in np.split(undecided, range(rows, len(undecided), rows)):
            decided, *found = _candidates(index, queries[some], k, wanted)
            similarity[some, : found[0].shape[1]], position[some, : found[0].shape[1]] = found
            left.append(some[~decided])
        undecided, wanted = np.concatenate(left), 2 * wanted
    return Neighbors(torch.from_numpy(similarity), torch.from_numpy(position))


def _candidates(index: Any, queries: np.ndarray, k: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k best of so many candidates, and (Q,) whether no other item can be among the k best."""
    rough, position, stored = index.search_and_reconstruct(queries, wanted)
    # The sum over a row of its own: equal vectors have equal scores, which a matrix product does not promise.
    score = (queries[:, None].astype(np.float64) * stored).sum(2)
    score[position < 0] = -np.inf
    order = np.lexsort((position, -score), axis=-1)[:, :k]
    error = ROUNDING * index.d * LONGEST * np.linalg.norm(queries, axis=1)
    decided = (position[:, -1] < 0) | (rough[:, -1] + error < rough[:, min(k, wanted) - 1] - error)
    if wanted == index.ntotal:
        decided[:] = True
    return decided, np.take_along_axis(score, order, 1), np.take_along_axis(position, order, 1)


def merged(shards: Sequence[Neighbors], offsets: Sequence[int], k: int) -> Neighbors:
    """The k best of the neighbours found in shards of a gallery, which begin at ascending offsets."""
    similarity = torch.cat([shard.similarity for shard in shards], 1)
    position = torch.cat(
        [torch.where(s.position < 0, -1, s.position + offset) for s, offset in zip(shards, offsets, strict=True)], 1
    )
    similarity, order = similarity.sort(dim=1, descending=True, stable=True)
    return Neighbors(similarity[:, :k], position.gather(1, order[:, :k]))
