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

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dml_core import gather
from dml_core.retrieval import full_list, neighbors
from dml_core.retrieval.mutual import mutual_neighbors
from dml_core.retrieval.neighbors import TileStream, block_rows, owned_rows, pad_rows
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

    def stream(
        numbers: Sequence[int], blocks: Sequence[Tensor] = blocks, shard: Tensor = shard
    ) -> Iterator[tuple[int, int, Tensor]]:
        gallery_blocks = neighbors.gallery_blocks(shard, len(targets), rank, world)
        left_out = [own_positions[n] for n in numbers] if same_set else None
        for index, offset, similarity in neighbors.similarities(
            [blocks[n] for n in numbers], gallery_blocks, left_out, rows
        ):
            number = numbers[index]
            if in_gallery is not None:
                outside = is_query[offset : offset + similarity.shape[1]]
                similarity[:, : len(outside)].masked_fill_(outside, -torch.inf)
                similarity.masked_fill_(~is_query[own_positions[number]][:, None], -torch.inf)
            yield number, offset, similarity

    places = max([1, *ks, rerank or 0, *(CMC_RANKS if "cmc" in extra else ())])
    most_relevant = [int(count.max()) for count in all_counts.cpu().split(rows)]
    depth = [min(len(targets), max(places, most)) for most in most_relevant]
    one_set = query is shard and in_gallery is None  # ranked by cosine: what i is to j, j is to i
    if one_set and not neighbors.tiles_of(query.device).by_topk:
        gallery_blocks = neighbors.gallery_blocks(shard, len(targets), rank, world)
        best = mutual_neighbors(blocks, gallery_blocks, depth, rows, rank, world)
    else:
        best = neighbors.find_best(stream, blocks, depth[rank::world], query.device, world)
    if rerank:
        products = [block_best.similarity[:, :rerank].clone() for block_best in best]
        for number, offset, similarity in stream(range(len(blocks)), adaptive_blocks, adaptive[1]):
            neighbors.fill_scores(products[number], best[number].position[:, :rerank], similarity, offset)
        best = [neighbors.reorder(block_best, product) for block_best, product in zip(best, products, strict=True)]
    scores = [
        _scores(_relevance(block_best, label, targets), count, ks, extra)
        for block_best, label, count in zip(best, block_labels, counts, strict=True)
    ]
    if "map" in extra:
        own, is_gallery = own_positions if same_set else None, None if in_gallery is None else ~is_query
        given = block_labels, counts, most_relevant[rank::world], own, targets, is_gallery, query.dtype
        for score, precision in zip(scores, _full_list(stream, *given), strict=True):
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
    unit = torch.empty_like(shard)
    # In blocks of one shape, as the order of a norm's summation may depend on it.
    for block, unit_block in zip(shard.split(rows), unit.split(rows), strict=True):
        unit_block.copy_(F.normalize(pad_rows(block, rows))[: len(block)])
    return unit


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
    stream: TileStream,
    labels: Sequence[Tensor],
    counts: Sequence[Tensor],
    most: Sequence[int],
    own_positions: Sequence[Tensor] | None,
    targets: Tensor,
    is_gallery: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return, for each query block, the average precision (Q,) over the full ranking.

    One pass over the gallery finds the similarities of the relevant items, another counts the items that rank above
    each.

    Args:
        stream: Yields the similarities of query blocks.
        labels: Of the queries of each block.
        counts: How many relevant items these have.
        most: How many any query of a block has.
        own_positions: Of the queries in the gallery, which are not relevant to themselves; None: they are not in it.
        targets: (M,) labels of the gallery.
        is_gallery: (M,) bool, which of these are the gallery; None: all.
        dtype: Of similarities.
    """
    gallery = targets.argsort(stable=True)
    if is_gallery is not None:
        gallery = gallery[is_gallery[gallery]]
    classes, positions = targets[gallery], []
    for number, (label, count) in enumerate(zip(labels, counts, strict=True)):
        position = full_list.relevant_positions(label, classes, gallery, most[number] + 1)
        if own_positions is not None:
            position = torch.where(position == own_positions[number][:, None], -1, position)
        positions.append(torch.where(count[:, None] > 0, position, -1))
    values = [torch.full_like(position, torch.inf, dtype=dtype) for position in positions]
    numbers = range(len(labels))
    for number, offset, similarity in stream(numbers):
        neighbors.fill_scores(values[number], positions[number], similarity, offset)
    given = zip(positions, values, counts, most, strict=True)
    relevant = [full_list.sort_relevant(position, value, count, max(1, r)) for position, value, count, r in given]
    outranking = [item.total.new_zeros(len(item.total), item.position.shape[1] + 1) for item in relevant]
    for number, offset, similarity in stream(numbers):
        neighbors.leave_out(similarity, positions[number], offset)
        outranking[number] += full_list.count_outranking(relevant[number], similarity, offset)
    return [mean_average_precision(r, o) for r, o in zip(relevant, outranking, strict=True)]
