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

BLOCK = 256  # rows of the smallest block; all block sizes are multiples of it
GALLERY_BLOCK = 4096  # gallery rows of one matrix product: 256 x 4096 similarities stay in a processor's cache
GROUP = 32  # columns of which only the maximum is compared, as long as that cannot enter the k best

GalleryBlocks = Iterable[tuple[int, Tensor]]


class Neighbors(NamedTuple):
    """The k most similar items of each query, best first. Empty places hold -inf and -1.

    Attributes:
        similarity: (Q, k).
        position: (Q, k) in the gallery.
    """

    similarity: Tensor
    position: Tensor


def block_rows(total: int) -> int:
    """Return how many rows the blocks of a set of `total` items have.

    BLOCK, and more for large sets, where many small products cost more; at most four times that: 4096 x 4096
    similarities are in no cache, and take twice as long as in tiles of 1024 x 4096.
    """
    rows = BLOCK
    while rows < 4 * BLOCK and rows * 32 < total:
        rows *= 2
    return rows


def owned_rows(total: int, rank: int, world: int) -> Tensor:
    """Return the positions (n,), ascending, of the rows that `rank` of `world` holds: block b is on rank b % world."""
    positions = torch.arange(total)
    return positions[positions // block_rows(total) % world == rank]


def pad_rows(x: Tensor, rows: int) -> Tensor:
    """Return x (n, D) with zero rows below it, (rows, D); x itself where nothing is missing."""
    return x if len(x) == rows else F.pad(x, (0, 0, 0, rows - len(x)))


def gallery_blocks(shard: Tensor, total: int, rank: int, world: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the whole gallery in blocks, each row broadcast once by the rank that holds it. Call on every rank.

    Args:
        shard: (n, D), rows `owned_rows(total, rank, world)` of the gallery.
        total: Items of the gallery.
        rank: This process.
        world: How many processes there are.

    Yields:
        (offset, embeddings (g, D)) by ascending offset, g = GALLERY_BLOCK but for the last.
    """
    rows_sent = 0
    for offset in range(0, total, GALLERY_BLOCK):
        size = min(GALLERY_BLOCK, total - offset)
        block = shard.new_empty(size, shard.shape[1])
        owner = torch.arange(offset, offset + size, device=shard.device) // block_rows(total) % world
        for source in owner.unique().tolist():
            rows = (owner == source).nonzero().flatten()
            if source == rank:
                piece = shard[rows_sent : rows_sent + len(rows)]
                rows_sent += len(rows)
            else:
                piece = shard.new_empty(len(rows), shard.shape[1])
            block[rows] = gather.broadcast(piece, source) if world > 1 else piece
        yield offset, block


def similarities(
    queries: Sequence[Tensor], gallery: GalleryBlocks, own_positions: Sequence[Tensor] | None, rows: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield the similarities of all queries and gallery items, gallery block after gallery block.

    Args:
        queries: Blocks (Q, D) with Q <= rows.
        gallery: Blocks (offset, embeddings (g, D)) by ascending offset.
        own_positions: For each block the gallery positions (Q,) of the queries themselves; None: they are not in it.
        rows: Rows that every block of queries is filled up to.

    Yields:
        (number of the query block, offset of the gallery block, similarity (Q, G)). G is g rounded up to a multiple of
        BLOCK; columns past g, and the queries themselves, are -inf. The tensor is used again for the next block.
    """
    padded = [pad_rows(query, rows) for query in queries]
    for offset, embeddings in gallery:
        size = len(embeddings)
        columns = pad_rows(embeddings, -(-size // BLOCK) * BLOCK)
        product = columns.new_empty(rows, len(columns))
        for number, query in enumerate(queries):
            torch.mm(padded[number], columns.T, out=product)
            product[:, size:] = -torch.inf
            if own_positions is not None:
                column = own_positions[number] - offset
                row = ((column >= 0) & (column < size)).nonzero().flatten()
                product[row, column[row]] = -torch.inf
            yield number, offset, product[: len(query)]


def empty_neighbors(queries: Tensor, k: int) -> Neighbors:
    """Return k empty places for each row of queries (Q, D), which `update` fills."""
    shape = (len(queries), k)
    return Neighbors(queries.new_full(shape, -torch.inf), torch.full(shape, -1, device=queries.device))


def update(best: Neighbors, similarity: Tensor, offset: int) -> None:
    """Merge the similarities of a gallery block into the k best so far, in place.

    Blocks must come by ascending offset: an item as similar as the k-th best so far then comes later in the gallery and
    loses, so that only what is strictly above it has to be compared.

    Args:
        best: The k best so far.
        similarity: (Q, G), of the gallery positions offset ... offset + G.
        offset: Gallery position of the first column.
    """
    k = best.position.shape[1]
    row, column, value = _candidates(similarity, best.similarity[:, -1:], k)
    if not len(row):
        return
    changed, inverse, count = row.unique_consecutive(return_inverse=True, return_counts=True)
    column_in_merge = k + _position_in_run(inverse, count)
    shape = (len(changed), k + int(count.max()))
    values = similarity.new_full(shape, -torch.inf)
    positions = torch.full(shape, -1, device=similarity.device)
    values[:, :k], positions[:, :k] = best.similarity[changed], best.position[changed]
    values[inverse, column_in_merge], positions[inverse, column_in_merge] = value, column + offset
    # Gallery positions ascend along a row wherever values are equal: a stable sort keeps the lower one first.
    values, order = values.sort(dim=1, descending=True, stable=True)
    best.similarity[changed] = values[:, :k]
    best.position[changed] = positions.gather(1, order[:, :k])


def _candidates(similarity: Tensor, floor: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choose entries that include the k best of each row, as far as they exceed floor (Q, 1).

    The k-th greatest maximum of a group is a bound that at least k items reach. Everything that reaches it is taken,
    ties included: which of several equal items torch.topk returns is undefined, the value of its last one is not.
    Once the best are good, what exceeds them is so little that no bound is needed.

    Returns:
        Row, column and value of the entries, each (P,); rows ascend, and columns ascend within a row.
    """
    groups, peak = similarity.unflatten(1, (-1, GROUP)), _group_maxima(similarity)
    promising, bound = peak > floor, torch.full_like(floor, -torch.inf)
    if promising.sum() > k * len(promising):
        bounding = peak if k <= peak.shape[1] else similarity
        bound = bounding.topk(min(k, bounding.shape[1]), dim=1).values[:, -1:]
        promising &= peak >= bound
    row, group = promising.nonzero(as_tuple=True)
    value = groups[row, group]
    pair, lane = ((value > floor[row]) & (value >= bound[row])).nonzero(as_tuple=True)
    return row[pair], group[pair] * GROUP + lane, value[pair, lane]


def _group_maxima(similarity: Tensor) -> Tensor:
    """Return (Q, G / GROUP), the maximum of each group of columns.

    They are read in the order of memory, which for a transposed matrix takes a fortieth of the time.
    """
    if similarity.stride(1) == 1:
        return similarity.unflatten(1, (-1, GROUP)).amax(2)
    return similarity.T.unflatten(0, (-1, GROUP)).amax(1).T.contiguous()


def _position_in_run(row: Tensor, count: Tensor) -> Tensor:
    """Number the entries of each run of equal values from 0. row: (P,), runs of 0, 1, 2, ...; count: their lengths."""
    start = count.cumsum(0) - count
    return torch.arange(len(row), device=row.device) - start[row]


@torch.no_grad()
def nearest(queries: Tensor, gallery: GalleryBlocks, k: int, own_positions: Tensor | None = None) -> Neighbors:
    """Find the k gallery items of greatest inner product with each query.

    Args:
        queries: (Q, D).
        gallery: Blocks (offset, embeddings (G, D)) by ascending offset, finite and of the queries' type; blocks of
            GALLERY_BLOCK items are fastest.
        k: How many neighbours a query gets.
        own_positions: (Q,) gallery position of each query itself, which is left out of its neighbours.

    Returns:
        The neighbours (Q, k), best first, ties by gallery position; empty places where the gallery has fewer items.
    """
    blocks = queries.split(BLOCK)
    own_blocks = None if own_positions is None else own_positions.split(BLOCK)
    best = [empty_neighbors(block, k) for block in blocks]
    for number, offset, similarity in similarities(blocks, gallery, own_blocks, BLOCK):
        update(best[number], similarity, offset)
    return Neighbors(torch.cat([b.similarity for b in best]), torch.cat([b.position for b in best]))


def fill_scores(score: Tensor, best: Neighbors, similarity: Tensor, offset: int) -> None:
    """Copy the scores of the K best neighbours from a block of another similarity, in place.

    Args:
        score: (Q, K), in which those of the neighbours in this block are set.
        best: The neighbours, at least K.
        similarity: (Q, G), of the gallery positions offset ... offset + G.
        offset: Gallery position of the first column.
    """
    column = best.position[:, : score.shape[1]] - offset
    inside = (column >= 0) & (column < similarity.shape[1])
    score.copy_(torch.where(inside, similarity.gather(1, column.clamp(0, similarity.shape[1] - 1)), score))


def reorder(best: Neighbors, score: Tensor) -> Neighbors:
    """Order the K best by new scores (Q, K), equals in the order they had; the others follow as they were."""
    k = score.shape[1]
    score, order = score.sort(dim=1, descending=True, stable=True)
    similarity = torch.cat([score, best.similarity[:, k:]], 1)
    return Neighbors(similarity, torch.cat([best.position[:, :k].gather(1, order), best.position[:, k:]], 1))


class Relevant(NamedTuple):
    """The same-class items of each query, the worst first.

    Attributes:
        similarity: (Q, R) ascending, filled up with inf.
        position: (Q, R) in the gallery, descending among equals, filled up with -1.
        total: (Q,) how many there are.
    """

    similarity: Tensor
    position: Tensor
    total: Tensor


def relevant_items(row: Tensor, position: Tensor, value: Tensor, total: Tensor) -> Relevant:
    """Sort the relevant items of a query block.

    Args:
        row: (P,) query of each item.
        position: (P,) its gallery position; ascending among the items of a row.
        value: (P,) its similarity.
        total: (Q,) how many items a query has.

    Returns:
        The items by query.
    """
    order = row.argsort(stable=True)
    row, shape = row[order], (len(total), max(1, int(total.max())))
    # Filled from the right, so that positions descend along a row and the stable sort leaves equals that way.
    column = shape[1] - 1 - _position_in_run(row, total)
    values, positions = value.new_full(shape, torch.inf), torch.full(shape, -1, device=row.device)
    values[row, column], positions[row, column] = value[order], position[order]
    values, order = values.sort(dim=1, stable=True)
    return Relevant(values, positions.gather(1, order), total)


def count_outranking(relevant: Relevant, similarity: Tensor, offset: int) -> Tensor:
    """Count how many columns of a gallery block rank above exactly the first 0, 1, ..., R relevant items.

    Args:
        relevant: The relevant items of the queries.
        similarity: (Q, G), of the gallery positions offset ... offset + G.
        offset: Gallery position of the first column.

    Returns:
        (Q, R + 1) counts.
    """
    items = relevant.similarity.shape[1]
    first = torch.searchsorted(relevant.similarity, similarity.contiguous())
    tied = relevant.similarity.gather(1, first.clamp(max=items - 1)) == similarity
    row, column = tied.nonzero(as_tuple=True)
    first[row, column] = _end_of_later(relevant, row, similarity[row, column], column + offset, first[row, column])
    row_start = torch.arange(len(first), device=first.device)[:, None] * (items + 1)
    return (first + row_start).flatten().bincount(minlength=len(first) * (items + 1)).view(-1, items + 1)


def _end_of_later(relevant: Relevant, row: Tensor, value: Tensor, position: Tensor, low: Tensor) -> Tensor:
    """Skip relevant items as similar as a candidate but later in the gallery, which the candidate outranks.

    A bisection per candidate: comparing each with all relevant items would need P x R memory when many tie.

    Args:
        relevant: The relevant items of the queries.
        row: (P,) query of each candidate.
        value: (P,) its similarity.
        position: (P,) its gallery position.
        low: (P,) where the relevant items of that similarity start.

    Returns:
        (P,) where those later in the gallery end.
    """
    high = torch.full_like(low, relevant.similarity.shape[1])
    for _ in range(relevant.similarity.shape[1].bit_length()):
        middle = ((low + high) // 2).clamp(max=relevant.similarity.shape[1] - 1)
        later = (relevant.similarity[row, middle] == value) & (relevant.position[row, middle] > position) & (low < high)
        low, high = torch.where(later, middle + 1, low), torch.where(later, high, middle)
    return low
