"""The k best columns of large tiles of similarities by torch.topk: exact in ties, and never waiting for the host.

Where a processor looks at a tile to skip most of it (neighbors.update), a GPU would wait for the host's decision each
time. Here every tile takes the same operations, and a tile is read once: maxima of groups of columns say in which
groups its k best are. That is exact, as what lies in no group of the k greatest maxima is exceeded, or equalled, by
these k maxima, which are items themselves.

Ties: torch.topk leaves open which of several equal items it returns, but not how many are above a value. So SPARE more
than k are kept. If the last of them is below the k-th, all items as good as the k-th are among them, and sorting those
by position settles every tie. Else the row is tied: more than SPARE items equal the k-th. What is above it is known all
the same, and a second look at the tiles fills the other places with the first items that equal it.

Legend: Q queries, G columns of a tile, k neighbours, K = k + SPARE kept on the way.
"""

import math

import torch
from torch import Tensor

SPARE = 8  # chance makes pairs of equal similarities, not nine equal ones
LARGEST_GROUP = 256  # divides the columns of every tile, neighbors.BLOCK


def best_columns(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return k greatest values of each row, and their columns, in any order and of equals any.

    torch.topk reads a row some twenty times. So the tile is read once for the maxima of groups, torch.topk chooses k of
    the groups, and then k of their columns: about sqrt(G k) numbers each time. A group is a column in so many of a row,
    not a run of columns, which lets a GPU read whole lines of memory into separate maxima.

    Args:
        similarity: (Q, G), G a multiple of LARGEST_GROUP where G > k.
        k: How many; at most G are returned.

    Returns:
        Values and columns, each (Q, min(k, G)).
    """
    columns = similarity.shape[1]
    if columns <= k:
        return similarity, torch.arange(columns, device=similarity.device).expand_as(similarity)
    group = min(LARGEST_GROUP, 2 ** round(math.log2(columns / k) / 2))
    if group == 1:
        values, column = similarity.topk(k, dim=1, sorted=False)
        return values, column
    width = columns // group
    chosen = similarity.unflatten(1, (group, width)).amax(1).topk(k, dim=1, sorted=False).indices
    lane = torch.arange(0, columns, width, device=similarity.device)
    candidates = (lane[:, None] + chosen[:, None]).flatten(1)
    values, place = similarity.gather(1, candidates).topk(k, dim=1, sorted=False)
    return values, candidates.gather(1, place)


def keep_best(best: Tensor, position: Tensor, similarity: Tensor, offset: int) -> None:
    """Merge the similarities of a tile into the K best so far, in place.

    Args:
        best: (Q, K) similarities, in any order; -inf in empty places.
        position: (Q, K), of these in the gallery.
        similarity: (Q, G), of the gallery positions offset ... offset + G.
        offset: Gallery position of the first column.
    """
    values, column = best_columns(similarity, best.shape[1])
    _merge(best, position, values, column + offset)


def _merge(best: Tensor, position: Tensor, values: Tensor, positions: Tensor) -> None:
    greatest, place = torch.cat([best, values], 1).topk(best.shape[1], dim=1, sorted=False)
    position.copy_(torch.cat([position, positions], 1).gather(1, place))
    best.copy_(greatest)


def settle(best: Tensor, position: Tensor) -> Tensor:
    """Sort what was kept, best first and equals by position, in place.

    Args:
        best: (Q, K) similarities. Places of -inf become empty, -1.
        position: (Q, K).

    Returns:
        (Q,) bool, whether a row is tied: then the places among the first k that equal the k-th hold any such items.
    """
    ascending, order = position.sort(dim=1)
    similarity, order = best.gather(1, order).sort(dim=1, descending=True, stable=True)
    position.copy_(ascending.gather(1, order).masked_fill(similarity == -torch.inf, -1))
    best.copy_(similarity)
    kth, last = best[:, -SPARE - 1], best[:, -1]
    return (kth == last) & (kth > -torch.inf)


def keep_first_equal(key: Tensor, position: Tensor, similarity: Tensor, kth: Tensor, offset: int) -> None:
    """Merge a tile into the first k items of the gallery that equal the k-th best, in place.

    Args:
        key: (Q, k) float64, minus the positions so far in any order; -inf in empty places.
        position: (Q, k).
        similarity: (Q, G), of the gallery positions offset ... offset + G; G <= 2**24.
        kth: (Q, 1) the k-th similarity.
        offset: Gallery position of the first column.
    """
    column = torch.arange(similarity.shape[1], dtype=similarity.dtype, device=similarity.device)
    values, columns = best_columns(torch.where(similarity == kth, -column, -torch.inf), key.shape[1])
    positions = columns + offset
    _merge(key, position, torch.where(values > -torch.inf, -positions.double(), -torch.inf), positions)


def fill_ties(best: Tensor, position: Tensor, key: Tensor, equal: Tensor, tied: Tensor) -> None:
    """Write the first items that equal the k-th into the places of tied rows that are theirs, in place.

    Args:
        best: (Q, k) similarities, best first.
        position: (Q, k), which is changed.
        key: (Q, k), of `keep_first_equal`.
        equal: (Q, k) positions, of `keep_first_equal`.
        tied: (Q,) bool, see `settle`.
    """
    place = torch.arange(best.shape[1], device=best.device) - (best > best[:, -1:]).sum(1, keepdim=True)
    first = equal.gather(1, key.argsort(dim=1, descending=True)).gather(1, place.clamp(min=0))
    position.copy_(torch.where(tied[:, None] & (place >= 0), first, position))
