"""Retrieval metrics over exact cosine neighbours: R@k, R-Precision, MAP@R, and optionally full-list MAP, CMC, NMI, AMI.

Musgrave et al. 2020, "A Metric Learning Reality Check", section 3.2 (R-Precision, MAP@R). Equal to
pytorch-metric-learning's AccuracyCalculator on normalised embeddings.
But:
- Queries without a match (R = 0) are counted and left out of every mean, of R@k too.
- Cosine similarity, with ties by gallery position; AccuracyCalculator ranks by L2 distance and leaves ties to Faiss.
- Each process holds the blocks that `owned_rows` names, and the result is the same bit for bit for any number of
  processes on equal hardware: sums are taken per block of queries, in float64, and added in the order of the blocks.

Legend: N queries, M gallery items, Q queries of a block, D dimensions, k places, R same-class items of a query.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dml_core import gather
from dml_core.retrieval import neighbors
from dml_core.retrieval.mutual import mutual_neighbors
from dml_core.retrieval.neighbors import block_rows, owned_rows, pad_rows
from dml_core.retrieval.scores import average_precision_at_r, cmc, mean_average_precision, r_precision, recall_at_k
from dml_core.retrieval.structure import index_vectors, query_vectors

CMC_RANKS = (1, 5, 10, 20, 30)
CLUSTERING = ("nmi", "ami")
RANKING = ("map", "cmc")
EXTRA_METRICS = (*RANKING, *CLUSTERING)


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
    ks: Sequence[int] = (1, 2, 4, 8),
    extra: Sequence[str] = (),
    seed: int = 0,
    structure: Tensor | None = None,
    rerank: int | None = None,
    in_gallery: Tensor | None = None,
) -> dict[str, float]:
    """Compute retrieval metrics of whole sets in this process, without others even inside a process group.

    Args:
        query: (N, D) embeddings of the queries.
        query_labels: (N,) integers.
        gallery: (M, D) embeddings. By default the queries are the gallery, each left out of its own ranking.
        gallery_labels: (M,) integers.
        ks: The k of recall_at_k; may exceed M.
        extra: Further metrics, of EXTRA_METRICS: map, cmc, nmi, ami. The last two cluster the queries.
        seed: Seed of the clustering.
        structure: (N, D) structure embeddings of the queries, by which the gallery is ranked: by adaptive distance
            between unit embeddings (structure.py).
        rerank: Only the first so many of the plain ranking are ranked by `structure`.
        in_gallery: (N,) bool, where no gallery is given: these samples are the gallery, and the others the queries.

    Returns:
        recall_at_<k>, map_at_r, r_precision, queries_without_match (a count), and with `extra` also
        mean_average_precision, cmc_at_<CMC_RANKS>, nmi, ami. All but the count are 0 where no query has a match.

    Raises:
        ValueError: Sizes do not fit, a set is empty, an embedding is not finite, or a name in `extra` is unknown.
    """
    if unknown := set(extra) - {*RANKING, *CLUSTERING}:
        raise ValueError(f"extra: {sorted(unknown)} unknown; allowed are {[*RANKING, *CLUSTERING]}")
    ranking = [name for name in extra if name in RANKING]
    arguments = query, query_labels, gallery, gallery_labels, ks, ranking, structure, rerank, in_gallery
    metrics = _metrics(*arguments, rank=0, world=1)
    if set(extra) & set(CLUSTERING):
        metrics |= {k: v for k, v in clustering_metrics(query, query_labels, seed).items() if k in extra}
    return metrics


def sharded_retrieval_metrics(
    query_shard: Tensor,
    query_labels: Tensor,
    gallery_shard: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    ks: Sequence[int] = (1, 2, 4, 8),
    extra: Sequence[str] = (),
    structure_shard: Tensor | None = None,
    rerank: int | None = None,
    in_gallery: Tensor | None = None,
) -> dict[str, float]:
    """Compute `retrieval_metrics` of sets whose rows lie on several processes. Call on every rank.

    Gallery blocks are broadcast one after the other (three times with map, twice with rerank).

    Args:
        query_shard: (n, D), rows `owned_rows(N, rank, world)` of the queries; none on a rank that owns none.
        query_labels: (N,) of the whole set.
        gallery_shard: (m, D), the same of the gallery.
        gallery_labels: (M,) of the whole gallery.
        ks: The k of recall_at_k.
        extra: Any of map, cmc; clustering needs all embeddings in one process.
        structure_shard: (n, D) structure embeddings of the queries in `query_shard`.
        rerank: As in `retrieval_metrics`.
        in_gallery: (N,) of the whole set, as in `retrieval_metrics`.

    Returns:
        The metrics, on every rank.

    Raises:
        ValueError: As `retrieval_metrics`.
    """
    if unknown := set(extra) - set(RANKING):
        raise ValueError(f"extra: {sorted(unknown)} unknown or not possible in shards; allowed are {list(RANKING)}")
    arguments = query_shard, query_labels, gallery_shard, gallery_labels, ks, extra, structure_shard, rerank, in_gallery
    return _metrics(*arguments, gather.rank(), gather.world_size())


@torch.no_grad()
def _metrics(
    query: Tensor,
    query_labels: Tensor,
    gallery: Tensor | None,
    gallery_labels: Tensor | None,
    ks: Sequence[int],
    extra: Sequence[str],
    structure: Tensor | None,
    rerank: int | None,
    in_gallery: Tensor | None,
    rank: int,
    world: int,
) -> dict[str, float]:
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("gallery and gallery_labels go together: give both or neither")
    if any(k < 1 for k in ks):
        raise ValueError(f"ks: {list(ks)}; every k must be at least 1")
    if rerank and (structure is None or "map" in extra):
        raise ValueError(f"rerank={rerank} needs structure embeddings, and has no ranking of the full list (map)")
    if in_gallery is not None and (gallery is not None or len(in_gallery) != len(query_labels)):
        raise ValueError("in_gallery: one entry a query, and no gallery beside it")
    same_set = gallery is None
    labels = torch.as_tensor(query_labels, device=query.device)
    targets = labels if gallery_labels is None else torch.as_tensor(gallery_labels, device=query.device)
    shard = query = _normalized("query", query, len(labels), rank, world)
    if gallery is not None:
        shard = _normalized("gallery", gallery, len(targets), rank, world)
        if shard.shape[1] != query.shape[1]:
            raise ValueError(f"query has {query.shape[1]} dimensions, gallery {shard.shape[1]}")
        dtype = torch.promote_types(query.dtype, shard.dtype)
        query, shard = query.to(dtype), shard.to(dtype)

    adaptive = query, shard
    if structure is not None:
        if structure.shape != query.shape:
            raise ValueError(f"structure: shape {tuple(structure.shape)}, but the queries have {tuple(query.shape)}")
        adaptive = query_vectors(query, structure.to(query.dtype)), index_vectors(shard)
        query, shard = (query, shard) if rerank else adaptive

    rows, owned = block_rows(len(labels)), owned_rows(len(labels), rank, world).to(query.device)
    if in_gallery is None:
        is_query = torch.ones_like(labels, dtype=torch.bool)
        all_counts = _match_counts(labels, targets) - int(same_set)
    else:
        is_query = ~in_gallery.to(query.device)
        all_counts = _match_counts(labels, labels[~is_query]) * is_query
    # A rank may own no block at all: it still takes part in every broadcast.
    blocks, adaptive_blocks, own_positions, block_labels, counts = (
        x.split(rows) if len(x) else () for x in (query, adaptive[0], owned, labels[owned], all_counts[owned])
    )

    def stream(blocks: Sequence[Tensor] = blocks, shard: Tensor = shard) -> Iterator[tuple[int, int, Tensor]]:
        gallery_blocks = neighbors.gallery_blocks(shard, len(targets), rank, world)
        left_out = own_positions if same_set else None
        for number, offset, similarity in neighbors.similarities(blocks, gallery_blocks, left_out, rows):
            if in_gallery is not None:
                similarity[:, is_query[offset : offset + similarity.shape[1]].nonzero().flatten()] = -torch.inf
                similarity[(~is_query[own_positions[number]]).nonzero().flatten()] = -torch.inf
            yield number, offset, similarity

    places = max([1, *ks, rerank or 0, *(CMC_RANKS if "cmc" in extra else ())])
    depth = [min(len(targets), max(places, int(count.max()))) for count in all_counts.split(rows)]
    if query is shard and in_gallery is None:  # one set, ranked by cosine: what i is to j, j is to i
        gallery_blocks = neighbors.gallery_blocks(shard, len(targets), rank, world)
        best = mutual_neighbors(blocks, gallery_blocks, depth, rows, rank, world)
    else:
        best = [neighbors.empty_neighbors(block, k) for block, k in zip(blocks, depth[rank::world], strict=True)]
        for number, offset, similarity in stream():
            neighbors.update(best[number], similarity, offset)
    if rerank:
        products = [block_best.similarity[:, :rerank].clone() for block_best in best]
        for number, offset, similarity in stream(adaptive_blocks, adaptive[1]):
            neighbors.fill_scores(products[number], best[number], similarity, offset)
        best = [neighbors.reorder(block_best, product) for block_best, product in zip(best, products, strict=True)]
    scores = [
        _scores(_relevance(block_best, label, targets), count, ks, extra)
        for block_best, label, count in zip(best, block_labels, counts, strict=True)
    ]
    if "map" in extra:
        for score, precision in zip(scores, _full_list(stream, block_labels, targets, counts), strict=True):
            score["mean_average_precision"] = precision

    names = [*_scores(targets.new_zeros(0, places).bool(), targets.new_zeros(0), ks, extra)]
    names += ["mean_average_precision"] * ("map" in extra)
    # One row a block of the whole set: adding other ranks' zeros is exact, so the sum over rows knows no ranks.
    sums = torch.zeros(-(-len(labels) // rows), len(names), dtype=torch.float64, device=query.device)
    for number, (score, count) in enumerate(zip(scores, counts, strict=True)):
        sums[rank + number * world] = torch.stack([score[name] for name in names])[:, count > 0].sum(1)
    totals = (gather.all_sum(sums) if world > 1 else sums).sum(0).tolist()
    matched = int((all_counts > 0).sum())
    means = {name: total / max(matched, 1) for name, total in zip(names, totals, strict=True)}
    return means | {"queries_without_match": int(is_query.sum()) - matched}


def _normalized(name: str, shard: Tensor, total: int, rank: int, world: int) -> Tensor:
    """Check a shard (n, D), and return its rows at unit length, float32 or better."""
    rows, expected = block_rows(total), len(owned_rows(total, rank, world))
    if not total:
        raise ValueError(f"{name}: the set is empty")
    if shard.ndim != 2 or len(shard) != expected:
        raise ValueError(f"{name}: shape {tuple(shard.shape)}, but {total} labels make it {expected} rows here")
    broken = (~shard.isfinite().all(1)).sum()
    if count := int(gather.all_sum(broken) if world > 1 else broken):
        raise ValueError(f"{name}: {count} of {total} embeddings are not finite")
    shard = shard.detach().to(torch.promote_types(shard.dtype, torch.float32))
    # In blocks of one shape, as the order of a norm's summation may depend on it.
    return torch.cat([F.normalize(pad_rows(block, rows))[: len(block)] for block in shard.split(rows)])


def _match_counts(labels: Tensor, targets: Tensor) -> Tensor:
    """Return (N,), how many gallery items have each query's label."""
    values, counts = targets.unique(return_counts=True)
    index = torch.searchsorted(values, labels).clamp(max=len(values) - 1)
    return torch.where(values[index] == labels, counts[index], 0)


def _relevance(best: neighbors.Neighbors, labels: Tensor, targets: Tensor) -> Tensor:
    """Return (Q, k) bool, whether a neighbour has the query's label; False at empty places (position -1)."""
    return (targets[best.position] == labels[:, None]) & (best.position >= 0)


def _scores(relevant: Tensor, count: Tensor, ks: Sequence[int], extra: Sequence[str]) -> dict[str, Tensor]:
    scores = {f"recall_at_{k}": recall_at_k(relevant, k) for k in ks}
    scores |= {"map_at_r": average_precision_at_r(relevant, count), "r_precision": r_precision(relevant, count)}
    if "cmc" in extra:
        curve = cmc(relevant)
        scores |= {f"cmc_at_{k}": curve[:, min(k, curve.shape[1]) - 1] for k in CMC_RANKS}
    return scores


def _full_list(
    stream: Callable[[], Iterator[tuple[int, int, Tensor]]],
    labels: Sequence[Tensor],
    targets: Tensor,
    counts: Sequence[Tensor],
) -> list[Tensor]:
    """Return, for each query block, the average precision (Q,) over the full ranking.

    One pass over the gallery finds the relevant items, another counts the items that rank above each.
    """

    def same_class(number: int, offset: int, similarity: Tensor) -> Tensor:
        columns = targets[offset : offset + similarity.shape[1]]
        match = labels[number][:, None] == F.pad(columns, (0, similarity.shape[1] - len(columns)))
        return match & (similarity > -torch.inf)

    matches: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in labels]
    for number, offset, similarity in stream():
        row, column = same_class(number, offset, similarity).nonzero(as_tuple=True)
        matches[number].append((row, column + offset, similarity[row, column]))
    relevant = []
    for pieces, count in zip(matches, counts, strict=True):
        row, position, value = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        relevant.append(neighbors.relevant_items(row, position, value, count))
    outranking = [item.total.new_zeros(len(item.total), item.position.shape[1] + 1) for item in relevant]
    for number, offset, similarity in stream():
        similarity.masked_fill_(same_class(number, offset, similarity), -torch.inf)
        outranking[number] += neighbors.count_outranking(relevant[number], similarity, offset)
    return [mean_average_precision(r, o) for r, o in zip(relevant, outranking, strict=True)]
