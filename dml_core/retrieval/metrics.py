"""Retrieval metrics over exact cosine neighbours: R@k, R-Precision, MAP@R, and further ones by name.

Musgrave et al. 2020, "A Metric Learning Reality Check", section 3.2 (R-Precision, MAP@R). Equal to
pytorch-metric-learning's AccuracyCalculator on normalised embeddings. scores.py defines the metrics, task.py says what
a query is ranked against, and ranked.py ranks.
But:
- Queries without a match (R = 0) are counted and left out of every mean, of R@k too.
- Cosine similarity, with ties by gallery position; AccuracyCalculator ranks by L2 distance and leaves ties to Faiss.

Legend: N queries, M gallery items, D dimensions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dml_core import gather
from dml_core.retrieval import neighbors
from dml_core.retrieval.neighbors import owned_rows
from dml_core.retrieval.ranked import rank_queries
from dml_core.retrieval.scores import CLUSTERING, KS, is_metric, metric_names
from dml_core.retrieval.task import make_task


def clustering_metrics(embeddings: Tensor, labels: Tensor, seed: int = 0) -> dict[str, float]:
    """Cluster embeddings by k-means, k the number of classes, and compare the clusters with the classes.

    Embeddings are normalised first; k-means is that of pytorch-metric-learning (Faiss, 20 iterations), but seeded.

    Args:
        embeddings: (N, D).
        labels: (N,) integers.
        seed: Seed of k-means.

    Returns:
        nmi and ami: normalised and adjusted mutual information, by arithmetic means of entropies.
    """
    import faiss
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

    points = F.normalize(embeddings.detach().float()).cpu().numpy()
    truth = torch.as_tensor(labels).cpu().numpy()
    # Faiss would print a warning for classes of fewer than 39 points; nothing else depends on that number.
    kmeans = faiss.Kmeans(points.shape[1], len(np.unique(truth)), niter=20, seed=seed, min_points_per_centroid=1)
    kmeans.train(points)
    clusters = kmeans.index.search(points, 1)[1].ravel()
    return {
        "nmi": float(normalized_mutual_info_score(truth, clusters)),
        "ami": float(adjusted_mutual_info_score(truth, clusters)),
    }


@torch.no_grad()
def sharded_clustering_metrics(shard: Tensor, labels: Tensor, seed: int = 0) -> dict[str, float]:
    """Compute `clustering_metrics` of a set whose rows lie on several processes. Call on every rank.

    Rank 0 gathers the N x D numbers and clusters them on one thread, as rounding depends on how many there are.

    Args:
        shard: (n, D), rows `owned_rows(N, rank, world)` of the set; none on a rank that owns none.
        labels: (N,) of the whole set.
        seed: Seed of k-means.

    Returns:
        nmi and ami, on every rank.

    Raises:
        ValueError: The sizes do not fit.
    """
    import faiss

    rank, world = gather.rank(), gather.world_size()
    if len(shard) != len(owned_rows(len(labels), rank, world)):
        raise ValueError(f"shard: {len(shard)} rows, which are not this rank's of {len(labels)} labels")
    blocks = []
    for _, block in neighbors.gallery_blocks(shard.clone(), len(labels), rank, world):  # no inference tensor is sent
        if rank == 0:  # the others take part, and keep nothing
            blocks.append(block)
    values = torch.zeros(len(CLUSTERING), dtype=torch.float64, device=shard.device)
    if rank == 0:
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            metrics = clustering_metrics(torch.cat(blocks), labels, seed)
        finally:
            faiss.omp_set_num_threads(threads)
        values += torch.tensor([metrics[name] for name in CLUSTERING], dtype=torch.float64, device=shard.device)
    return dict(zip(CLUSTERING, gather.broadcast(values, 0).tolist(), strict=True))


def retrieval_metrics(
    query: Tensor,
    query_labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    ks: Sequence[int] = KS,
    extra: Sequence[str] = (),
    seed: int = 0,
    structure: Tensor | None = None,
    rerank: int | None = None,
    in_gallery: Tensor | None = None,
    query_cameras: Tensor | None = None,
    gallery_cameras: Tensor | None = None,
    query_positions: Tensor | None = None,
    return_per_class: bool = False,
) -> dict[str, Any]:
    """Compute retrieval metrics of whole sets in this process, without others even inside a process group.

    Args:
        query: (N, D) embeddings of the queries.
        query_labels: (N,) whole numbers, none negative.
        gallery: (M, D) embeddings. By default the queries are the gallery, each left out of its own ranking.
        gallery_labels: (M,) whole numbers.
        ks: The k of recall_at_k; may exceed M.
        extra: Further metrics: map, mrr, cmc, precision_at_<k>, map_at_<k>, recall_at_<k>, nmi, ami. The last two
            cluster the queries.
        seed: Seed of the clustering.
        structure: (N, D) structure embeddings of the queries, by which the gallery is ranked: by adaptive distance
            between unit embeddings (structure.py).
        rerank: Only the first so many of the plain ranking are ranked by `structure`.
        in_gallery: (N,) bool, where no gallery is given: these samples are the gallery, and the others the queries.
        query_cameras: (N,) whole numbers: gallery items of a query's own label and camera are left out of its ranking,
            as re-identification does. Negative: no camera, nothing is left out.
        gallery_cameras: (M,), where there is a gallery.
        query_positions: (N,), where queries are part of the gallery: the position of each in it, which is left out of
            its own ranking; -1 for a query that is no part of it. Else a query would find itself.
        return_per_class: Return for each metric its mean over the queries of each label, by label.

    Returns:
        recall_at_<k>, map_at_r, r_precision, queries_without_match (a count), and with `extra` also
        mean_average_precision, mrr, cmc_at_<CMC_RANKS>, precision_at_<k>, map_at_<k>, nmi, ami. All but the count are 0
        where no query has a match. With `return_per_class`, name -> label -> value, of labels with a matched query.

    Raises:
        ValueError: Sizes do not fit, a set is empty, labels are no whole numbers, an embedding is not finite, or a name
            in `extra` is unknown.
    """
    _require_metrics(extra)
    clustering = [name for name in extra if name in CLUSTERING]
    if clustering and return_per_class:
        raise ValueError(f"extra: {', '.join(clustering)}: of all clusters at once, and has no values by class")
    _require_pair(gallery, gallery_labels)
    task = make_task(
        query_labels, gallery_labels, query.device, query_cameras, gallery_cameras, query_positions, in_gallery
    )
    ranking = [name for name in extra if name not in CLUSTERING]
    ranked = rank_queries(task, query, gallery, ks, ranking, structure, rerank, alone=True)
    if return_per_class:
        return ranked.means_by_class()
    metrics = ranked.means()
    if clustering:
        metrics |= {k: v for k, v in clustering_metrics(query, task.labels, seed).items() if k in clustering}
    return metrics


def sharded_retrieval_metrics(
    query_shard: Tensor,
    query_labels: Tensor,
    gallery_shard: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    ks: Sequence[int] = KS,
    extra: Sequence[str] = (),
    structure_shard: Tensor | None = None,
    rerank: int | None = None,
    in_gallery: Tensor | None = None,
    query_cameras: Tensor | None = None,
    gallery_cameras: Tensor | None = None,
    query_positions: Tensor | None = None,
) -> dict[str, float]:
    """Compute `retrieval_metrics` of sets whose rows lie on several processes. Call on every rank.

    Gallery blocks are broadcast one after the other (three times with map or mrr, twice with rerank).

    Args:
        query_shard: (n, D), rows `owned_rows(N, rank, world)` of the queries; none on a rank that owns none.
        query_labels: (N,) of the whole set.
        gallery_shard: (m, D), the same of the gallery.
        gallery_labels: (M,) of the whole gallery.
        ks: The k of recall_at_k.
        extra: As in `retrieval_metrics`, but no clustering, which needs all embeddings in one process.
        structure_shard: (n, D) structure embeddings of the queries in `query_shard`.
        rerank: As in `retrieval_metrics`.
        in_gallery: (N,) of the whole set, as in `retrieval_metrics`.
        query_cameras: (N,) of the whole set, as in `retrieval_metrics`.
        gallery_cameras: (M,) of the whole gallery.
        query_positions: (N,) of the whole set, as in `retrieval_metrics`.

    Returns:
        The metrics, on every rank.

    Raises:
        ValueError: As `retrieval_metrics`.
    """
    _require_metrics(extra)
    if clustering := [name for name in extra if name in CLUSTERING]:
        raise ValueError(f"extra: {', '.join(clustering)}: not possible in shards, see sharded_clustering_metrics")
    _require_pair(gallery_shard, gallery_labels)
    task = make_task(
        query_labels, gallery_labels, query_shard.device, query_cameras, gallery_cameras, query_positions, in_gallery
    )
    return rank_queries(task, query_shard, gallery_shard, ks, extra, structure_shard, rerank).means()


def _require_metrics(extra: Sequence[str]) -> None:
    names = [extra] if isinstance(extra, str) else [*extra]
    unknown = [name for name in names if not is_metric(name)]
    if unknown or isinstance(extra, str):
        raise ValueError(f"extra: {unknown or names} unknown; a list of names, of {', '.join(metric_names())}")


def _require_pair(gallery: Tensor | None, gallery_labels: Tensor | None) -> None:
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("gallery and gallery_labels go together: give both or neither")
