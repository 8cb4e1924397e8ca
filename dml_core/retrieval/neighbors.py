"""Exact nearest neighbours by inner product, block against block: never queries x gallery in memory.

Every matrix product has a shape and operands that follow from the sizes of the whole sets alone, short blocks being
filled with zero rows. Similarities are therefore equal bit for bit however many processes share the queries, and ties
are broken exactly: of two equally similar items the one with the lower gallery position comes first. The device says
how large a tile of similarities is, and how the best of it are found (TILES); what is found does not depend on it, but
for the rounding of its products.

Legend: Q queries of a block, G gallery items of a block, D dimensions, k neighbours, K items in question, P candidates.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dml_core import gather
from dml_core.retrieval import topk

BLOCK = 256  # rows of the smallest block; all block sizes are multiples of it
GALLERY_BLOCK = 4096  # gallery rows of one matrix product: 256 x 4096 similarities stay in a processor's cache
GROUP = 32  # columns of which only the maximum is compared, as long as that cannot enter the k best

GalleryBlocks = Iterable[tuple[int, Tensor]]
# Numbers of query blocks -> (number, offset of the gallery block, similarity (Q, G)) of each, by ascending offset.
TileStream = Callable[[Sequence[int]], Iterator[tuple[int, int, Tensor]]]


class Tiles(NamedTuple):
    """The tiles of similarities that suit a device. Sizes are multiples of BLOCK.

    Attributes:
        queries: Rows of a tile, of a search that may choose them.
        gallery: Most columns of a tile.
        by_topk: Find the best of a tile by torch.topk (topk.py), without waiting for the host; else by `update`, which
            looks at a tile in order to skip most of it.
    """

    queries: int
    gallery: int
    by_topk: bool


# Type of device -> its tiles. On a GPU a thousand rows keep all of it busy, and the more columns there are, the fewer
# times the best are merged: 512 MiB in float32.
TILES = {"cpu": Tiles(BLOCK, GALLERY_BLOCK, by_topk=False), "cuda": Tiles(4 * BLOCK, 2**17, by_topk=True)}


def tiles_of(device: torch.device) -> Tiles:
    """Return the tiles that suit a device."""
    return TILES["cpu" if device.type == "cpu" else "cuda"]


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
        (offset, embeddings (g, D)) by ascending offset, g = `tiles_of(device).gallery` but for the last.
    """
    rows, size, rows_sent = block_rows(total), tiles_of(shard.device).gallery, 0
    for offset in range(0, total, size):
        if world == 1:
            yield offset, shard[offset : offset + size]
            continue
        end = min(offset + size, total)
        first, count = offset // rows, -(-(end - offset) // rows)
        block = shard.new_empty(count, rows, shard.shape[1])
        for source in range(world):
            places = block[(source - first) % world :: world]
            if source == rank:
                piece = shard[rows_sent : rows_sent + len(places) * rows]
                rows_sent += len(piece)
                piece = pad_rows(piece, len(places) * rows)
            else:
                piece = shard.new_empty(len(places) * rows, shard.shape[1])
            if len(places):
                places.copy_(gather.broadcast(piece, source).view_as(places))
        yield offset, block.flatten(0, 1)[: end - offset]


@contextmanager
def _full_float32() -> Iterator[None]:
    """Keep TF32 out of float32 products on a GPU, also where the caller allows it for others.

    It is allowed again by PyTorch's older switch, the only one that both its interfaces understand.
    """
    matmul = torch.backends.cuda.matmul
    allowed = matmul.fp32_precision == "tf32"
    if allowed:
        matmul.allow_tf32 = False
    try:
        yield
    finally:
        if allowed:
            matmul.allow_tf32 = True


def similarities(
    queries: Sequence[Tensor], gallery: GalleryBlocks, left_out: Sequence[Tensor] | None, rows: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield the similarities of all queries and gallery items, gallery block after gallery block.

    Args:
        queries: Blocks (Q, D) with Q <= rows.
        gallery: Blocks (offset, embeddings (g, D)) by ascending offset.
        left_out: For each block the gallery positions (Q,) or (Q, K) of what is left out of the queries' rankings, such
            as the queries themselves; -1: nothing.
        rows: Rows that every block of queries is filled up to.

    Yields:
        (number of the query block, offset of the gallery block, similarity (Q, G)). G is g rounded up to a multiple of
        BLOCK; columns past g, and what is left out, are -inf. The tensor is used again for the next block.
    """
    padded = [pad_rows(query, rows) for query in queries]
    for offset, embeddings in gallery:
        size = len(embeddings)
        columns = pad_rows(embeddings, -(-size // BLOCK) * BLOCK)
        product = columns.new_empty(rows, len(columns))
        for number, query in enumerate(queries):
            with _full_float32():
                torch.mm(padded[number], columns.T, out=product)
            product[:, size:] = -torch.inf
            similarity = product[: len(query)]
            if left_out is not None:
                leave_out(similarity, left_out[number].view(len(query), -1), offset)
            yield number, offset, similarity


def leave_out(similarity: Tensor, position: Tensor, offset: int) -> None:
    """Set the similarities of some items to -inf, in place.

    Args:
        similarity: (Q, G), of the gallery positions offset ... offset + G.
        position: (Q, K) of the items in the gallery; those outside this block are passed over.
        offset: Gallery position of the first column.
    """
    column = position - offset
    outside = (column < 0) | (column >= similarity.shape[1])
    # The least of what is there and what is written: an item outside writes inf, which changes nothing.
    written = similarity.new_full(outside.shape, -torch.inf).masked_fill_(outside, torch.inf)
    similarity.scatter_reduce_(1, column.clamp(0, similarity.shape[1] - 1), written, "amin")


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


def find_best(
    stream: TileStream, queries: Sequence[Tensor], depth: Sequence[int], device: torch.device, world: int = 1
) -> list[Neighbors]:
    """Find the gallery items of greatest similarity with each query. Call on every rank.

    Args:
        stream: Yields the similarities of some of the query blocks, the same each time that it is called.
        queries: Blocks (Q, D), of which only sizes and types count.
        depth: For each block, how many neighbours its queries get.
        device: That of the similarities.
        world: How many processes search in step.

    Returns:
        For each block the neighbours, best first, ties by gallery position.
    """
    numbers: Sequence[int] = range(len(queries))
    if not tiles_of(device).by_topk:
        best = [empty_neighbors(block, k) for block, k in zip(queries, depth, strict=True)]
        for number, offset, similarity in stream(numbers):
            update(best[number], similarity, offset)
        return best
    kept = [empty_neighbors(block, k + topk.SPARE) for block, k in zip(queries, depth, strict=True)]
    for number, offset, similarity in stream(numbers):
        topk.keep_best(*kept[number], similarity, offset)
    tied = [topk.settle(*block) for block in kept]
    best = [Neighbors(*(x[:, :k] for x in block)) for block, k in zip(kept, depth, strict=True)]
    # The only time that the host waits for the device: which blocks have tied rows, and is it any of any rank?
    in_blocks = torch.stack([rows.any() for rows in tied]).tolist() if tied else []
    numbers = [number for number, is_tied in enumerate(in_blocks) if is_tied]
    if not (gather.all_sum(torch.tensor(len(numbers), device=device)) if world > 1 else numbers):
        return best
    first_equal = {n: empty_neighbors(queries[n].double(), depth[n]) for n in numbers}
    for n, offset, similarity in stream(numbers):
        topk.keep_first_equal(*first_equal[n], similarity, best[n].similarity[:, -1:], offset)
    for n in numbers:
        topk.fill_ties(*best[n], *first_equal[n], tied[n])
    return best


@torch.no_grad()
def nearest(queries: Tensor, gallery: GalleryBlocks, k: int, own_positions: Tensor | None = None) -> Neighbors:
    """Find the k gallery items of greatest inner product with each query.

    Args:
        queries: (Q, D).
        gallery: Blocks (offset, embeddings (G, D)) by ascending offset, finite and of the queries' type and device; the
            whole gallery may be one block, [(0, gallery)], as large ones are cut. On a GPU they are looked at twice
            where ties need it, so that an iterator is not enough.
        k: How many neighbours a query gets.
        own_positions: (Q,) gallery position of each query itself, which is left out of its neighbours; or (Q, K) of
            itself and others that are. -1: nothing.

    Returns:
        The neighbours (Q, k), best first, ties by gallery position; empty places where the gallery has fewer items.

    Raises:
        ValueError: k < 1.
    """
    if k < 1:
        raise ValueError(f"k={k}: at least one neighbour is needed")
    tiles = tiles_of(queries.device)
    blocks = queries.split(tiles.queries)
    own_blocks = None if own_positions is None else own_positions.split(tiles.queries)

    def stream(numbers: Sequence[int]) -> Iterator[tuple[int, int, Tensor]]:
        left_out = None if own_blocks is None else [own_blocks[n] for n in numbers]
        cut = ((at + i * tiles.gallery, x) for at, block in gallery for i, x in enumerate(block.split(tiles.gallery)))
        for index, offset, similarity in similarities([blocks[n] for n in numbers], cut, left_out, tiles.queries):
            yield numbers[index], offset, similarity

    best = find_best(stream, blocks, [k] * len(blocks), queries.device)
    return Neighbors(torch.cat([b.similarity for b in best]), torch.cat([b.position for b in best]))


def fill_scores(score: Tensor, position: Tensor, similarity: Tensor, offset: int) -> None:
    """Copy the scores of some items from a block of similarities, in place.

    Args:
        score: (Q, K), in which those of the items in this block are set.
        position: (Q, K) of the items in the gallery; -1: none.
        similarity: (Q, G), of the gallery positions offset ... offset + G.
        offset: Gallery position of the first column.
    """
    column = position - offset
    inside = (column >= 0) & (column < similarity.shape[1])
    score.copy_(torch.where(inside, similarity.gather(1, column.clamp(0, similarity.shape[1] - 1)), score))


def reorder(best: Neighbors, score: Tensor) -> Neighbors:
    """Order the K best by new scores (Q, K), equals in the order they had; the others follow as they were."""
    k = score.shape[1]
    score, order = score.sort(dim=1, descending=True, stable=True)
    similarity = torch.cat([score, best.similarity[:, k:]], 1)
    return Neighbors(similarity, torch.cat([best.position[:, :k].gather(1, order), best.position[:, k:]], 1))
