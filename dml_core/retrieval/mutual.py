"""Nearest neighbours inside one set: each pair of items is multiplied once, for both of them.

The product of block a by block b, transposed, is that of b by a: half the multiplications of queries by gallery.
Gallery blocks come in turn, and each process multiplies those of its own blocks that lie before the end of the gallery
block. The neighbours that it finds for other processes' items are sent to these processes before the next gallery block
comes: a process stores neighbours of its own items, and of one gallery block's. As in neighbors.py, shapes and operands
follow from the size of the set alone, and of equals the one with the lower position comes first, however many processes
there are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dml_core import gather
from dml_core.retrieval.neighbors import BLOCK, GalleryBlocks, Neighbors, empty_neighbors, pad_rows, update


def mutual_neighbors(
    blocks: Sequence[Tensor], gallery: GalleryBlocks, depth: Sequence[int], rows: int, rank: int, world: int
) -> list[Neighbors]:
    """Find the nearest items of each item but itself, for the blocks of this process. Call on every rank.

    Args:
        blocks: This process's blocks of the set, b = rank, rank + world, ...; each of `rows` rows, the set's last one
            perhaps of fewer.
        gallery: (offset, embeddings) of the whole set, as `neighbors.gallery_blocks` yields it.
        depth: For each block of the set, how many neighbours its items get.
        rows: Rows of a block.
        rank: This process.
        world: How many processes there are.

    Returns:
        For each of `blocks` the neighbours of its items, best first, ties by position.
    """
    padded = {rank + i * world: pad_rows(block, rows) for i, block in enumerate(blocks)}
    best = dict[int, Neighbors]()
    for offset, embeddings in gallery:
        size = len(embeddings)
        columns = pad_rows(embeddings, -(-size // BLOCK) * BLOCK)
        # The blocks inside this gallery block: this process collects neighbours for all of them.
        inside = {(offset + start) // rows: embeddings[start : start + rows] for start in range(0, size, rows)}
        best |= {number: empty_neighbors(block, depth[number]) for number, block in inside.items()}
        product = columns.new_empty(rows, len(columns))
        for number in padded:
            start = max(0, number * rows - offset)
            if start >= size:
                break
            similarity = product[:, start:]
            torch.mm(padded[number], columns[start:].T, out=similarity)
            similarity[:, size - start :] = -torch.inf
            if number in inside:
                similarity.fill_diagonal_(-torch.inf)
            update(best[number], similarity[: len(best[number].position)], offset + start)
            for other, block in inside.items():
                if other > number:
                    first = other * rows - offset
                    update(best[other], product[:, first : first + len(block)].T, number * rows)
        for number in inside:
            block_best = best.pop(number)
            if world > 1:
                block_best = _merge_ranks(block_best, number % world)
            if number % world == rank:
                best[number] = block_best
    return [best[number] for number in padded]


def _merge_ranks(best: Neighbors, owner: int) -> Neighbors:
    """Merge, on the rank `owner`, the neighbours that all ranks have found for the same items; useless elsewhere."""
    k = best.position.shape[1]
    position, similarity = (torch.cat(gather.collect(x, owner), 1) for x in (best.position, best.similarity))
    position, by_position = position.sort(dim=1, stable=True)
    similarity, order = similarity.gather(1, by_position).sort(dim=1, descending=True, stable=True)
    return Neighbors(similarity[:, :k], position.gather(1, order)[:, :k])
