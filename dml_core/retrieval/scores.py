"""The definitions of the metrics, and their names: a score of each query by which of its neighbours are relevant.

Musgrave et al. 2020, "A Metric Learning Reality Check", section 3.2 (R-Precision, MAP@R).

Scores are float64. Legend: Q queries, R relevant items of a query: those of its class that are not left out.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from dml_core.retrieval.full_list import Relevant

KS = (1, 2, 4, 8)  # of recall_at_k, where nobody asks for others
FULL_LIST = ("map", "mrr")  # over the whole ranking: two more passes over the gallery, for both together
RANKING = (*FULL_LIST, "cmc")
CLUSTERING = ("nmi", "ami")
CMC_RANKS = (1, 5, 10, 20, 30)
PER_K = ("precision", "map", "recall")  # precision_at_10, ...: metrics with a k of their own
AT_K = re.compile(rf"({'|'.join(PER_K)})_at_([1-9]\d{{0,6}})")


def is_metric(name: str) -> bool:
    """Whether a name is that of a further metric, such as map or precision_at_10."""
    return name in (*RANKING, *CLUSTERING) or AT_K.fullmatch(name) is not None


def metric_names() -> list[str]:
    """Return the names of all further metrics; K stands for a number."""
    return [*RANKING, *(f"{name}_at_K" for name in PER_K), *CLUSTERING]


def metric_order(name: str) -> tuple[int, int]:
    """Return a key that sorts the names of further metrics as metric_names does, and by K."""
    match = AT_K.fullmatch(name)
    return metric_names().index(f"{match[1]}_at_K" if match else name), int(match[2]) if match else 0


def places_needed(ks: Sequence[int], extra: Sequence[str]) -> int:
    """Return how many neighbours of a query the scores need, besides R."""
    own = [int(match[2]) for name in extra if (match := AT_K.fullmatch(name))]
    return max([1, *ks, *own, *(CMC_RANKS if "cmc" in extra else ())])


def scores_of(relevant: Tensor, count: Tensor, ks: Sequence[int], extra: Sequence[str]) -> dict[str, Tensor]:
    """Return the scores of a block of queries that follow from their nearest neighbours.

    Args:
        relevant: (Q, places) bool, best first: whether a neighbour is of the query's class.
        count: (Q,) R.
        ks: The k of recall_at_k.
        extra: Names of further metrics; those of the whole ranking are passed over.

    Returns:
        Name -> (Q,).
    """
    scores = {f"recall_at_{k}": recall_at_k(relevant, k) for k in ks}
    scores |= {"map_at_r": average_precision_at_r(relevant, count), "r_precision": r_precision(relevant, count)}
    if "cmc" in extra:
        curve = cmc(relevant)
        scores |= {f"cmc_at_{k}": curve[:, min(k, curve.shape[1]) - 1] for k in CMC_RANKS}
    for name in extra:
        if match := AT_K.fullmatch(name):
            k = int(match[2])
            if match[1] == "recall":
                scores[name] = recall_at_k(relevant, k)
            elif match[1] == "precision":
                scores[name] = precision_at_k(relevant, k)
            else:
                scores[name] = average_precision_at_k(relevant, count, k)
    return scores


def full_list_scores(relevant: Relevant, outranking: Tensor, extra: Sequence[str]) -> dict[str, Tensor]:
    """Return the scores of a block of queries over their whole rankings, those that `extra` names.

    relevant, outranking: see mean_average_precision.
    """
    scores = {}
    if "map" in extra:
        scores["mean_average_precision"] = mean_average_precision(relevant, outranking)
    if "mrr" in extra:
        scores["mrr"] = reciprocal_rank(relevant, outranking)
    return scores


def recall_at_k(relevant: Tensor, k: int) -> Tensor:
    """Return 1 where one of the k nearest is relevant, else 0.

    Args:
        relevant: (Q, places) bool, best first: whether a neighbour is of the query's class.
        k: How many neighbours count.

    Returns:
        (Q,) float64.
    """
    return relevant[:, :k].any(1).double()


def precision_at_k(relevant: Tensor, k: int) -> Tensor:
    """Return the share of relevant items among the k nearest: (1 / k) sum_{i <= k} [i relevant].

    It is divided by k also where R < k, so that a perfect ranking has R / k.

    Args:
        relevant: (Q, places) bool, best first; a gallery of fewer than k items has fewer places.
        k: How many neighbours count.

    Returns:
        (Q,) float64.
    """
    return relevant[:, :k].sum(1).double() / k


def average_precision_at_k(relevant: Tensor, count: Tensor, k: int) -> Tensor:
    """Return (1 / min(k, R)) sum_{i <= k} P(i) [i relevant], P(i) the precision of the i nearest.

    A perfect ranking has 1. With k = R it is MAP@R, with k = all items mean average precision.

    Args:
        relevant: (Q, places) bool, best first.
        count: (Q,) R.
        k: How many neighbours count.

    Returns:
        (Q,) float64; 0 where R = 0.
    """
    return _sum_of_precisions(relevant[:, :k]) / count.clamp(min=1, max=k)


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
    return _sum_of_precisions(_within(relevant, count)) / count.clamp(min=1)


def _sum_of_precisions(hit: Tensor) -> Tensor:
    """Return sum_i P(i) [i relevant], (Q,). hit: (Q, places) bool, which items are relevant and count."""
    rank = torch.arange(1, hit.shape[1] + 1, device=hit.device)
    return (hit.cumsum(1) * hit / rank.double()).sum(1)


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
    above = _irrelevant_above(outranking)
    index = torch.arange(above.shape[1], device=above.device)
    rank = (relevant.total[:, None] - index).clamp(min=0)
    return (rank / (rank + above).clamp(min=1).double()).sum(1) / relevant.total.clamp(min=1)


def reciprocal_rank(relevant: Relevant, outranking: Tensor) -> Tensor:
    """Return 1 / the rank of the first relevant item of the full ranking. Arguments: see mean_average_precision.

    Returns:
        (Q,) float64; 0 where R = 0.
    """
    first = relevant.total.clamp(min=1)[:, None] - 1  # the worst comes first in `relevant`
    rank = 1 + _irrelevant_above(outranking).gather(1, first)[:, 0]
    return (relevant.total > 0) / rank.double()


def _irrelevant_above(outranking: Tensor) -> Tensor:
    """Return how many irrelevant items rank above each relevant one, (Q, R), of outranking (Q, R + 1)."""
    return outranking.flip(1).cumsum(1).flip(1)[:, 1:]
