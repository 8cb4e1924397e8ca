"""The definitions of the metrics: a score of each query, in float64, by which of its neighbours are relevant.

Musgrave et al. 2020, "A Metric Learning Reality Check", section 3.2 (R-Precision, MAP@R).

Legend: Q queries, R same-class items of a query.
"""

import torch
from torch import Tensor

from dml_core.retrieval.full_list import Relevant


def recall_at_k(relevant: Tensor, k: int) -> Tensor:
    """Return 1 where one of the k nearest is relevant, else 0.

    Args:
        relevant: (Q, places) bool, best first: whether a neighbour is of the query's class.
        k: How many neighbours count.

    Returns:
        (Q,) float64.
    """
    return relevant[:, :k].any(1).double()


def r_precision(relevant: Tensor, count: Tensor) -> Tensor:
    """Return the share of relevant items among the R nearest.

    Args:
        relevant: (Q, >= R) bool, best first.
        count: (Q,) R.

    Returns:
        (Q,) float64; 0 where R = 0.
    """
    return _within(relevant, count).sum(1).double() / count.clamp(min=1)


def average_precision_at_r(relevant: Tensor, count: Tensor) -> Tensor:
    """Return (1 / R) sum_{i <= R} P(i) [i relevant], P(i) the precision of the i nearest.

    Args:
        relevant: (Q, >= R) bool, best first.
        count: (Q,) R.

    Returns:
        (Q,) float64; 0 where R = 0.
    """
    hit = _within(relevant, count)
    rank = torch.arange(1, relevant.shape[1] + 1, device=relevant.device)
    return (hit.cumsum(1) * hit / rank.double()).sum(1) / count.clamp(min=1)


def _within(relevant: Tensor, count: Tensor) -> Tensor:
    """Keep of relevant (Q, places) the first R places of each query; count: (Q,) R."""
    return relevant & (torch.arange(relevant.shape[1], device=relevant.device) < count[:, None])


def cmc(relevant: Tensor) -> Tensor:
    """Return the cumulative match curve (Q, places), float64: 1 from the first relevant item on. relevant: bool."""
    return relevant.cummax(1).values.double()


def mean_average_precision(relevant: Relevant, outranking: Tensor) -> Tensor:
    """Return the average precision over the full ranking: (1 / R) sum over relevant items of P(rank).

    The rank of a relevant item is its rank among the relevant ones plus the irrelevant ones above it, so no ranking is
    ever sorted.

    Args:
        relevant: The relevant items of the queries.
        outranking: (Q, R + 1) how many irrelevant items rank above exactly the first 0, ..., R of them, as
            `full_list.count_outranking` counts.

    Returns:
        (Q,) float64.
    """
    above = outranking.flip(1).cumsum(1).flip(1)[:, 1:]
    index = torch.arange(above.shape[1], device=above.device)
    rank = (relevant.total[:, None] - index).clamp(min=0)
    return (rank / (rank + above).clamp(min=1).double()).sum(1) / relevant.total.clamp(min=1)
