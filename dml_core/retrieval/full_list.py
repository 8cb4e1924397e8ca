"""The whole ranking of a query, as far as its relevant items need it: how many irrelevant items are above each of them.

No ranking is sorted: one look at all tiles of similarities fills in those of the relevant items, another counts. As in
neighbors.py, ties are broken by gallery position.

Legend: Q queries of a block, G gallery items of a block, M gallery items, R relevant items of a query, P candidates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dml_core.retrieval.neighbors import tiles_of

COUNTED = 2**23  # similarities: so many at once are counted without waiting, by several integers of 8 bytes for each
SPAN = 2**31  # more than any gallery has positions


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


def relevant_positions(labels: Tensor, classes: Tensor, gallery: Tensor, places: int) -> Tensor:
    """List the gallery items of the class of each query.

    Args:
        labels: (Q,) of the queries.
        classes: (M,) labels of the gallery items, ascending.
        gallery: (M,) positions of these items, ascending within a class.
        places: How many to list, at least as many as there are.

    Returns:
        (Q, places) positions, ascending, filled up with -1.
    """
    if not len(classes):
        return labels.new_full((len(labels), places), -1)
    place = torch.searchsorted(classes, labels)[:, None] + torch.arange(places, device=labels.device)
    inside, place = place < len(classes), place.clamp(max=len(classes) - 1)
    return torch.where(inside & (classes[place] == labels[:, None]), gallery[place], -1)


def sort_relevant(position: Tensor, similarity: Tensor, total: Tensor, most: int) -> Relevant:
    """Sort the relevant items of a query block.

    Args:
        position: (Q, P) of the items in the gallery, ascending but for places of -1, which hold none.
        similarity: (Q, P), inf where there is none.
        total: (Q,) how many items a query has.
        most: R, no query has more.

    Returns:
        The items by query.
    """
    similarity, order = similarity.flip(1).sort(dim=1, stable=True)
    position = position.flip(1).gather(1, order)
    return Relevant(similarity[:, :most].contiguous(), position[:, :most], total)


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
    if tiles_of(similarity.device).by_topk:
        return _count_without_waiting(relevant, similarity, offset)
    first = torch.searchsorted(relevant.similarity, similarity.contiguous())
    tied = relevant.similarity.gather(1, first.clamp(max=items - 1)) == similarity
    row, column = tied.nonzero(as_tuple=True)
    first[row, column] = _end_of_later(relevant, row, similarity[row, column], column + offset, first[row, column])
    row_start = torch.arange(len(first), device=first.device)[:, None] * (items + 1)
    return (first + row_start).flatten().bincount(minlength=len(first) * (items + 1)).view(-1, items + 1)


def _count_without_waiting(relevant: Relevant, similarity: Tensor, offset: int) -> Tensor:
    """Count as `count_outranking` does, by two searches for every column: the host need not know which are tied.

    The first search finds the first relevant item that is no less similar. An integer of its place and, if it is
    equal, of the column's position is then looked for among those of the relevant items, which ascend.
    """
    items, columns = relevant.similarity.shape[1], similarity.shape[1]
    position = torch.arange(columns, device=similarity.device) + offset
    key = torch.searchsorted(relevant.similarity, relevant.similarity) * SPAN + (SPAN - 1 - relevant.position)
    counts = key.new_zeros(len(key), items + 1)
    width = max(1, COUNTED // max(1, len(key)))
    for part, place in zip(similarity.split(width, dim=1), position.split(width), strict=True):
        values = part.contiguous()
        first = torch.searchsorted(relevant.similarity, values)
        tied = relevant.similarity.gather(1, first.clamp(max=items - 1)) == values
        first = torch.searchsorted(key, first * SPAN + torch.where(tied, SPAN - 1 - place, 0))
        counts.scatter_add_(1, first, first.new_ones(1, 1).expand_as(first))
    return counts


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
