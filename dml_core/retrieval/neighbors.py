"""Exact nearest neighbours by inner product, block against block: never queries x gallery in memory.

Every matrix product has a shape and operands that follow from the sizes of the whole sets alone, short blocks being
filled with zero rows. Similarities are therefore equal bit for bit however many processes share the queries, and ties
are broken exactly: of two equally similar items the one with the lower gallery position comes first.

Legend: Q queries of a block, G gallery items of a block, D dimensions, k neighbours, R relevant items, P candidates.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dml_core import gather

BLOCK = 256  # the least rows of a block; all block sizes are multiples of it
GALLERY_BLOCK = 4096  # gallery rows of one matrix product: 256 x 4096 similarities stay in a processor's cache
GROUP = 32  # columns looked at through their maximum alone, as long as that cannot enter the k best

GalleryBlocks = Iterable[tuple[int, Tensor]]


class Neighbors(NamedTuple):
    """The k most similar items, best first: similarity (Q, k), position (Q, k) in the gallery.

    Places left empty hold -inf and -1.
    """

    similarity: Tensor
    position: Tensor


def block_rows(total: int) -> int:
    """Rows of a block of a set of `total`: BLOCK, and more for large sets, where many small products cost more; at most
    four times that: 4096 x 4096 similarities are in no cache, and take twice as long as in tiles of 1024 x 4096."""
    rows = BLOCK
    while rows < 4 * BLOCK and rows * 32 < total:
        rows *= 2
    return rows


def owned_rows(total: int, rank: int, world: int) -> Tensor:
    """Positions (n,), ascending, of the rows that `rank` of `world` holds: block b belongs to rank b % world."""
    positions = torch.arange(total)
    return positions[positions // block_rows(total) % world == rank]


def pad_rows(x: Tensor, rows: int) -> Tensor:
    """x (n, D) with zero rows below it, (rows, D); x itself where nothing is missing."""
    return x if len(x) == rows else F.pad(x, (0, 0, 0, rows - len(x)))


def gallery_blocks(shard: Tensor, total: int, rank: int, world: int) -> Iterator[tuple[int, Tensor]]:
    """(offset, embeddings) of the whole gallery by ascending offset, each row sent once by the rank that owns it."""
    taken = 0
    for offset in range(0, total, GALLERY_BLOCK):
        size = min(GALLERY_BLOCK, total - offset)
        block = shard.new_empty(size, shard.shape[1])
        owner = torch.arange(offset, offset + size, device=shard.device) // block_rows(total) % world
        for source in owner.unique().tolist():
            place = (owner == source).nonzero().flatten()
            if source == rank:
                piece = shard[taken : taken + len(place)]
                taken += len(place)
            else:
                piece = shard.new_empty(len(place), shard.shape[1])
            block[place] = gather.broadcast(piece, source) if world > 1 else piece
        yield offset, block


def similarities(
    queries: Sequence[Tensor], gallery: GalleryBlocks, own: Sequence[Tensor] | None, rows: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (number of the query block, gallery offset, similarity (Q, G)), gallery block after gallery block.

    queries: blocks (Q, D) with Q <= rows. gallery: (offset, (g, D)). own: each query's own gallery position, (Q,) a
    block. G is g rounded up to a multiple of BLOCK; columns past g, and the queries themselves, are -inf. The tensor is
    reused: take what you need from it before the next one.
    """
    padded = [pad_rows(query, rows) for query in queries]
    for offset, embeddings in gallery:
        size = len(embeddings)
        columns = pad_rows(embeddings, -(-size // BLOCK) * BLOCK)
        product = columns.new_empty(rows, len(columns))
        for number, query in enumerate(queries):
            torch.mm(padded[number], columns.T, out=product)
            product[:, size:] = -torch.inf
            if own is not None:
                column = own[number] - offset
                row = ((column >= 0) & (column < size)).nonzero().flatten()
                product[row, column[row]] = -torch.inf
            yield number, offset, product[: len(query)]


def no_neighbors(queries: Tensor, k: int) -> Neighbors:
    """k empty places for each row of queries (Q, D), to be filled by `update`."""
    shape = (len(queries), k)
    return Neighbors(queries.new_full(shape, -torch.inf), torch.full(shape, -1, device=queries.device))


def update(best: Neighbors, similarity: Tensor, offset: int) -> None:
    """Merge the block `similarity` (Q, G), of gallery positions offset ... offset + G, into `best`, in place.

    Blocks must come by ascending offset: an item as similar as the k-th best so far then comes later in the gallery and
    loses, so that only what is strictly above it is looked at.
    """
    k = best.position.shape[1]
    row, column, value = _candidates(similarity, best.similarity[:, -1:], k)
    if not len(row):
        return
    changed, inverse, count = row.unique_consecutive(return_inverse=True, return_counts=True)
    place = k + _place_in_row(inverse, count)
    shape = (len(changed), k + int(count.max()))
    values = similarity.new_full(shape, -torch.inf)
    positions = torch.full(shape, -1, device=similarity.device)
    values[:, :k], positions[:, :k] = best.similarity[changed], best.position[changed]
    values[inverse, place], positions[inverse, place] = value, column + offset
    # Gallery positions ascend along a row wherever values are equal: a stable sort keeps the lower one first.
    values, order = values.sort(dim=1, descending=True, stable=True)
    best.similarity[changed] = values[:, :k]
    best.position[changed] = positions.gather(1, order[:, :k])


def _candidates(similarity: Tensor, floor: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and value, each (P,), of a set that holds all of the k best of each row that exceed floor (Q, 1).

    The k-th greatest maximum of a group is a bound that at least k items reach. Everything that reaches it is taken,
    ties included: which of several equal items torch.topk returns is undefined, the value of its last one is not.
    Once the best are good, what exceeds them is so little that no bound is needed.
    Rows ascend, and columns ascend within a row.
    """
    groups, peak = similarity.unflatten(1, (-1, GROUP)), _peaks(similarity)
    promising, bound = peak > floor, torch.full_like(floor, -torch.inf)
    if promising.sum() > k * len(promising):
        exact = peak if k <= peak.shape[1] else similarity
        bound = exact.topk(min(k, exact.shape[1]), dim=1).values[:, -1:]
        promising &= peak >= bound
    row, group = promising.nonzero(as_tuple=True)
    value = groups[row, group]
    pair, lane = ((value > floor[row]) & (value >= bound[row])).nonzero(as_tuple=True)
    return row[pair], group[pair] * GROUP + lane, value[pair, lane]


def _peaks(similarity: Tensor) -> Tensor:
    """(Q, G / GROUP) the greatest of each group of columns, read in the order of memory: a turned matrix takes a
    fortieth of the time so."""
    if similarity.stride(1) == 1:
        return similarity.unflatten(1, (-1, GROUP)).amax(2)
    return similarity.T.unflatten(0, (-1, GROUP)).amax(1).T.contiguous()


def _place_in_row(row: Tensor, count: Tensor) -> Tensor:
    """0, 1, 2, ... within each run of equal entries of row (P,), which counts up from 0; count: the runs' lengths."""
    start = count.cumsum(0) - count
    return torch.arange(len(row), device=row.device) - start[row]


@torch.no_grad()
def nearest(queries: Tensor, gallery: GalleryBlocks, k: int, own: Tensor | None = None) -> Neighbors:
    """The k gallery items of greatest inner product for each query, best first, ties by gallery position.

    queries: (Q, D). gallery: (offset, embeddings (G, D)) by ascending offset, finite and of the queries' type;
    blocks of GALLERY_BLOCK are fastest. own: (Q,) each query's own gallery position, left out of its neighbours.
    Returns similarity and position, each (Q, k); a gallery of fewer than k items leaves places of -inf and -1.
    """
    blocks = queries.split(BLOCK)
    best = [no_neighbors(block, k) for block in blocks]
    for number, offset, similarity in similarities(blocks, gallery, None if own is None else own.split(BLOCK), BLOCK):
        update(best[number], similarity, offset)
    return Neighbors(torch.cat([b.similarity for b in best]), torch.cat([b.position for b in best]))


def rescored(best: Neighbors, similarity: Tensor, offset: int, score: Tensor) -> None:
    """Fill in, from a block of another similarity (Q, G), the scores (Q, K) of the K best so far, in place."""
    place = best.position[:, : score.shape[1]] - offset
    inside = (place >= 0) & (place < similarity.shape[1])
    score.copy_(torch.where(inside, similarity.gather(1, place.clamp(0, similarity.shape[1] - 1)), score))


def reordered(best: Neighbors, score: Tensor) -> Neighbors:
    """The K best by their new scores (Q, K), equals in the order they had; the others after them, as they were."""
    k = score.shape[1]
    score, order = score.sort(dim=1, descending=True, stable=True)
    similarity = torch.cat([score, best.similarity[:, k:]], 1)
    return Neighbors(similarity, torch.cat([best.position[:, :k].gather(1, order), best.position[:, k:]], 1))


class Relevant(NamedTuple):
    """The same-class items of each query, the worst first.

    similarity: (Q, R) ascending, filled up with inf. position: (Q, R) in the gallery, descending among equals,
    filled up with -1. total: (Q,) how many there are.
    """

    similarity: Tensor
    position: Tensor
    total: Tensor


def relevant_items(row: Tensor, position: Tensor, value: Tensor, total: Tensor) -> Relevant:
    """Sort the relevant items of a query block. row, position, value: (P,); total: (Q,) items a row.

    Positions must ascend among the items of a row.
    """
    order = row.argsort(stable=True)
    row, shape = row[order], (len(total), max(1, int(total.max())))
    # Filled from the right, so that positions descend along a row and the stable sort leaves equals that way.
    place = shape[1] - 1 - _place_in_row(row, total)
    values, positions = value.new_full(shape, torch.inf), torch.full(shape, -1, device=row.device)
    values[row, place], positions[row, place] = value[order], position[order]
    values, order = values.sort(dim=1, stable=True)
    return Relevant(values, positions.gather(1, order), total)


def outranked(relevant: Relevant, similarity: Tensor, offset: int) -> Tensor:
    """(Q, R + 1): how many columns of similarity (Q, G) rank above exactly the first 0, 1, ..., R relevant items."""
    items = relevant.similarity.shape[1]
    first = torch.searchsorted(relevant.similarity, similarity.contiguous())
    tied = relevant.similarity.gather(1, first.clamp(max=items - 1)) == similarity
    row, column = tied.nonzero(as_tuple=True)
    first[row, column] = _end_of_later(relevant, row, similarity[row, column], column + offset, first[row, column])
    row_start = torch.arange(len(first), device=first.device)[:, None] * (items + 1)
    return (first + row_start).flatten().bincount(minlength=len(first) * (items + 1)).view(-1, items + 1)


def _end_of_later(relevant: Relevant, row: Tensor, value: Tensor, position: Tensor, low: Tensor) -> Tensor:
    """Of the relevant items of `value` that start at `low`, the end (P,) of those later in the gallery than `position`.

    A bisection per candidate: comparing each with all relevant items would need P x R memory when many tie.
    """
    high = torch.full_like(low, relevant.similarity.shape[1])
    for _ in range(relevant.similarity.shape[1].bit_length()):
        middle = ((low + high) // 2).clamp(max=relevant.similarity.shape[1] - 1)
        later = (relevant.similarity[row, middle] == value) & (relevant.position[row, middle] > position) & (low < high)
        low, high = torch.where(later, middle + 1, low), torch.where(later, high, middle)
    return low
