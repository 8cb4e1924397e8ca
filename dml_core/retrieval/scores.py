"""Scores of queries by which of their neighbours are relevant: the definitions, in float64.

Musgrave et al. 2020, "A Metric Learning Reality Check", section 3.2 (R-Precision, MAP@R).

Legend: Q queries, R same-class items of a query.
"""

import torch
from torch import Tensor

from dml_core.retrieval.neighbors import Relevant


def recall_at_k(relevant: Tensor, k: int) -> Tensor:
    """1 where one of the k nearest is relevant. relevant: (Q, places) bool, best first. Returns (Q,) float64."""
    return relevant[:, :k].any(1).double()


def r_precision(relevant: Tensor, count: Tensor) -> Tensor:
    """Share of relevant items among the R nearest. relevant: (Q, >= R) bool; count: (Q,) R. Returns (Q,) float64."""
    return _within(relevant, count).sum(1).double() / count.clamp(min=1)


def average_precision_at_r(relevant: Tensor, count: Tensor) -> Tensor:
    """(1 / R) sum_{i <= R} P(i) [i relevant], P(i) the precision of the i nearest. As r_precision."""
    hit = _within(relevant, count)
    place = torch.arange(1, relevant.shape[1] + 1, device=relevant.device)
    return (hit.cumsum(1) * hit / place.double()).sum(1) / count.clamp(min=1)


def _within(relevant: Tensor, count: Tensor) -> Tensor:
    return relevant & (torch.arange(relevant.shape[1], device=relevant.device) < count[:, None])


def cmc(relevant: Tensor) -> Tensor:
    """Cumulative match: at place i, 1 if the first relevant item is at i or before. (Q, places) bool -> float64."""
    return relevant.cummax(1).values.double()


def mean_average_precision(relevant: Relevant, outranked: Tensor) -> Tensor:
    """Average precision over the full ranking: (1 / R) sum over relevant items of P(rank). Returns (Q,) float64.

    outranked: (Q, R + 1) how many irrelevant items rank above exactly the first 0, ..., R of `relevant`. The rank of a
    relevant item is its rank among the relevant ones plus the irrelevant ones above it, so no ranking is ever sorted.
    """
    above = outranked.flip(1).cumsum(1).flip(1)[:, 1:]
    place = torch.arange(above.shape[1], device=above.device)
    rank = (relevant.total[:, None] - place).clamp(min=0)
    return (rank / (rank + above).clamp(min=1).double()).sum(1) / relevant.total.clamp(min=1)
