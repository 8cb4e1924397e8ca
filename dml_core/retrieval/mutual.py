"""Nearest neighbours inside one set: each pair of items is multiplied once, for both of them.

The product of block a by block b holds, turned, that of b by a: half the multiplications of queries by gallery. Gallery
blocks come in turn, and each process multiplies those of its own blocks that lie before the end of the gallery block.
What it so finds for items that others own is handed to their owners before the next one: a process holds neighbours of
its own items, and of one gallery block's. As in neighbors.py, shapes and operands follow from the size of the set
alone, and of equals the one with the lower position comes first, however many processes there are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dml_core import gather
from dml_core.retrieval.neighbors import BLOCK, GalleryBlocks, Neighbors, no_neighbors, pad_rows, update


def mutual_neighbors(
    blocks: Sequence[Tensor], gallery: GalleryBlocks, depth: Sequence[int], rows: int, rank: int, world: int
) -> list[Neighbors]:
    """The nearest items of each item but itself, best first, ties by position, for each of this process's blocks.

    blocks: of the set those that this process owns, b = rank, rank + world, ...; each of `rows` rows, the set's last
    one maybe of less. gallery: (offset, embeddings) of the whole set, as neighbors.gallery_blocks gives it.
    depth: for each block of the set, how many neighbours its items get.
    """
    padded = {rank + place * world: pad_rows(block, rows) for place, block in enumerate(blocks)}
    best = dict[int, Neighbors]()
    for offset, embeddings in gallery:
        size = len(embeddings)
        columns = pad_rows(embeddings, -(-size // BLOCK) * BLOCK)
        # The blocks inside this gallery block: what is found for them here, whoever owns them.
        inside = {(offset + start) // rows: embeddings[start : start + rows] for start in range(0, size, rows)}
        best |= {number: no_neighbors(block, depth[number]) for number, block in inside.items()}
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
            found = best.pop(number)
            if world > 1:
                found = _merged(found, number % world)
            if number % world == rank:
                best[number] = found
    return [best[number] for number in padded]


def _merged(found: Neighbors, owner: int) -> Neighbors:
    """On the rank `owner` the nearest of what all ranks found for the same items; elsewhere nothing of use."""
    k = found.position.shape[1]
    position, similarity = (torch.cat(gather.collect(x, owner), 1) for x in (found.position, found.similarity))
    position, order = position.sort(dim=1, stable=True)
    similarity, best = similarity.gather(1, order).sort(dim=1, descending=True, stable=True)
    return Neighbors(similarity[:, :k], position.gather(1, best)[:, :k])
