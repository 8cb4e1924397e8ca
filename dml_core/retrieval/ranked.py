"""Rank the gallery for every query and score the rankings, where the embeddings lie on several processes.

Each process holds the blocks that `owned_rows` names, and the result is the same bit for bit for any number of
processes on equal hardware: sums are taken per block of queries, in float64, and added in the order of the blocks.

Legend: N queries, M gallery items, n, m those of this process, Q queries of a block, D dimensions, k places.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dml_core import gather
from dml_core.retrieval import full_list, neighbors
from dml_core.retrieval.mutual import mutual_neighbors
from dml_core.retrieval.neighbors import Neighbors, TileStream, block_rows, owned_rows, pad_rows
from dml_core.retrieval.scores import FULL_LIST, full_list_scores, places_needed, scores_of
from dml_core.retrieval.structure import index_vectors, query_vectors
from dml_core.retrieval.task import Task


@dataclass(frozen=True)
class RankedQueries:
    """What the queries of a process have found.

    Attributes:
        task: Labels of all queries and of the gallery.
        rows: (n,) which of all queries these are.
        scores: Name of a metric -> (n,) float64. Only those of queries with a match (task.matches > 0) count.
        neighbors: For each block of the queries their nearest, `depth` of rank_queries or more of them.
        world: How many processes there are; `rank` is this one.
        rank: This process.
    """

    task: Task
    rows: Tensor
    scores: dict[str, Tensor]
    neighbors: list[Neighbors]
    rank: int
    world: int

    def means(self) -> dict[str, float]:
        """Return the mean of each score over all queries with a match, and the number of the others. On every rank."""
        total, size = len(self.task.labels), block_rows(len(self.task.labels))
        # One row a block of the whole set: adding other ranks' zeros is exact, so the sum over rows knows no ranks.
        sums = torch.zeros(-(-total // size), len(self.scores), dtype=torch.float64, device=self.rows.device)
        if len(self.rows):
            matched = (self.task.matches[self.rows] > 0).split(size)
            blocks = zip(*(score.split(size) for score in self.scores.values()), strict=True)
            for number, (block, mask) in enumerate(zip(blocks, matched, strict=True)):
                sums[self.rank + number * self.world] = torch.stack(block)[:, mask].sum(1)
        totals = (gather.all_sum(sums) if self.world > 1 else sums).sum(0).tolist()
        with_match = int((self.task.matches > 0).sum())
        means = {name: total / max(with_match, 1) for name, total in zip(self.scores, totals, strict=True)}
        return means | {"queries_without_match": int(self.task.is_query.sum()) - with_match}

    def means_by_class(self) -> dict[str, dict[int, float]]:
        """Return for each metric the mean over the queries of each label that have a match, where one process has all.

        `queries_without_match` has their number for every label.
        """
        assert self.world == 1
        matched, labels = self.task.matches > 0, self.task.labels

        def by_label(weights: Tensor, used: Tensor) -> dict[int, float]:
            classes, number = labels[used].unique(return_inverse=True)
            sums = torch.zeros(len(classes), dtype=torch.float64, device=labels.device)
            return dict(zip(classes.tolist(), sums.index_add_(0, number, weights[used]).tolist(), strict=True))

        counts = by_label(matched.double(), matched)
        means = {name: by_label(score, matched) for name, score in self.scores.items()}
        by_class = {
            name: {label: total / counts[label] for label, total in sums.items()} for name, sums in means.items()
        }
        unmatched = by_label((~matched).double(), self.task.is_query)
        return by_class | {"queries_without_match": unmatched}


@torch.no_grad()
def rank_queries(
    task: Task,
    query: Tensor,
    gallery: Tensor | None,
    ks: Sequence[int],
    extra: Sequence[str] = (),
    structure: Tensor | None = None,
    rerank: int | None = None,
    depth: int = 1,
    alone: bool = False,
) -> RankedQueries:
    """Rank the gallery for the queries of this process, and score the rankings. Call on every rank.

    Gallery blocks are broadcast one after the other (three times for scores of the whole ranking, twice with rerank).

    Args:
        task: Labels of all queries and of the gallery.
        query: (n, D), rows `owned_rows(N, rank, world)` of the queries; none on a rank that owns none.
        gallery: (m, D), the same of the gallery; None: the queries are the gallery.
        ks: The k of recall_at_k.
        extra: Further metrics, of scores.RANKING, or such as precision_at_10.
        structure: (n, D) structure embeddings of the queries, by which the gallery is ranked.
        rerank: Only the first so many of the plain ranking are ranked by `structure`.
        depth: At least so many neighbours are kept.
        alone: Whether this process has all rows, without others even inside a process group.

    Raises:
        ValueError: Sizes do not fit, a set is empty, or an embedding is not finite.
    """
    rank, world = (0, 1) if alone else (gather.rank(), gather.world_size())
    ks = _checked_ks(ks)
    if rerank is not None and rerank < 1:
        raise ValueError(f"rerank={rerank}: must be at least 1")
    if rerank and (structure is None or set(extra) & {*FULL_LIST}):
        names = ", ".join(FULL_LIST)
        raise ValueError(f"rerank={rerank} needs structure embeddings, and has no ranking of the full list ({names})")
    labels, targets = task.labels, task.targets
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
        _require_finite("structure", structure, len(labels), world)
        adaptive = query_vectors(query, structure.to(query.dtype)), index_vectors(shard)
        query, shard = (query, shard) if rerank else adaptive

    rows, owned = block_rows(len(labels)), owned_rows(len(labels), rank, world).to(query.device)
    # A rank may own no block at all: it still takes part in every broadcast.
    blocks, adaptive_blocks, owned_blocks = (x.split(rows) if len(x) else () for x in (query, adaptive[0], owned))
    left_out = task.left_out(owned_blocks)

    def stream(
        numbers: Sequence[int], blocks: Sequence[Tensor] = blocks, shard: Tensor = shard
    ) -> Iterator[tuple[int, int, Tensor]]:
        gallery_blocks = neighbors.gallery_blocks(shard, len(targets), rank, world)
        positions = None if left_out is None else [left_out[n] for n in numbers]
        for index, offset, similarity in neighbors.similarities(
            [blocks[n] for n in numbers], gallery_blocks, positions, rows
        ):
            number = numbers[index]
            if task.is_gallery is not None:
                outside = task.is_query[offset : offset + similarity.shape[1]]
                similarity[:, : len(outside)].masked_fill_(outside, -torch.inf)
                similarity.masked_fill_(~task.is_query[owned_blocks[number]][:, None], -torch.inf)
            yield number, offset, similarity

    places = max(places_needed(ks, extra), rerank or 0, depth)
    most_matches = [int(count.max()) for count in task.matches.cpu().split(rows)]
    depths = [min(len(targets), max(places, most)) for most in most_matches]
    # Ranked by cosine, and nothing is left out but the item itself: what i is to j, j is to i.
    mutual = query is shard and task.is_gallery is None and task.cameras is None
    if mutual and not neighbors.tiles_of(query.device).by_topk:
        gallery_blocks = neighbors.gallery_blocks(shard, len(targets), rank, world)
        best = mutual_neighbors(blocks, gallery_blocks, depths, rows, rank, world)
    else:
        best = neighbors.find_best(stream, blocks, depths[rank::world], query.device, world)
    if rerank:
        products = [block_best.similarity[:, :rerank].clone() for block_best in best]
        for number, offset, similarity in stream(range(len(blocks)), adaptive_blocks, adaptive[1]):
            neighbors.fill_scores(products[number], best[number].position[:, :rerank], similarity, offset)
        best = [neighbors.reorder(block_best, product) for block_best, product in zip(best, products, strict=True)]
    scores = [
        scores_of(task.is_right(own, block_best.position), task.matches[own], ks, extra)
        for own, block_best in zip(owned_blocks, best, strict=True)
    ]
    if set(extra) & {*FULL_LIST}:
        in_full = _full_list(stream, task, owned_blocks, most_matches[rank::world], query.dtype, extra)
        scores = [score | further for score, further in zip(scores, in_full, strict=True)]
    if not scores:
        nothing = full_list.Relevant(query.new_zeros(0, 1), owned.view(0, 1), owned)
        scores = [scores_of(owned.new_zeros(0, places).bool(), owned, ks, extra)]
        scores[0] |= full_list_scores(nothing, owned.new_zeros(0, 2), extra)
    by_name = {name: torch.cat([score[name] for score in scores]) for name in scores[0]}
    return RankedQueries(task, owned, by_name, best, rank, world)


def _checked_ks(ks: Sequence[int]) -> list[int]:
    try:
        numbers = [operator.index(k) for k in ks]
    except TypeError:
        raise ValueError(f"ks: {ks!r} is no list of whole numbers, such as (1, 2, 4, 8)") from None
    if any(k < 1 for k in numbers):
        raise ValueError(f"ks: {numbers}; every k must be at least 1")
    return numbers


def _normalized(name: str, shard: Tensor, total: int, rank: int, world: int) -> Tensor:
    """Check a shard (n, D), and return its rows at unit length, float32 or better."""
    rows, expected = block_rows(total), len(owned_rows(total, rank, world))
    if not total:
        raise ValueError(f"{name}: the set is empty")
    if shard.ndim != 2 or len(shard) != expected:
        raise ValueError(f"{name}: shape {tuple(shard.shape)}, but {total} labels make it {expected} rows here")
    _require_finite(name, shard, total, world)
    shard = shard.detach().to(torch.promote_types(shard.dtype, torch.float32))
    unit = torch.empty_like(shard)
    # In blocks of one shape, as the order of a norm's summation may depend on it.
    for block, unit_block in zip(shard.split(rows), unit.split(rows), strict=True):
        unit_block.copy_(F.normalize(pad_rows(block, rows))[: len(block)])
    return unit


def _require_finite(name: str, shard: Tensor, total: int, world: int) -> None:
    broken = (~shard.isfinite().all(1)).sum()
    if count := int(gather.all_sum(broken) if world > 1 else broken):
        raise ValueError(f"{name}: {count} of {total} embeddings are not finite")


def _full_list(
    stream: TileStream,
    task: Task,
    rows: Sequence[Tensor],
    most: Sequence[int],
    dtype: torch.dtype,
    extra: Sequence[str],
) -> list[dict[str, Tensor]]:
    """Return, for each query block, the scores (Q,) over the full ranking.

    One pass over the gallery finds the similarities of the relevant items, another counts the items that rank above
    each.

    Args:
        stream: Yields the similarities of query blocks.
        task: Says which items are relevant.
        rows: For each block which queries (Q,) it has.
        most: How many relevant items any query of a block has.
        dtype: Of similarities.
        extra: Names of metrics.
    """
    positions, numbers = task.right(rows), range(len(rows))
    values = [torch.full_like(position, torch.inf, dtype=dtype) for position in positions]
    for number, offset, similarity in stream(numbers):
        neighbors.fill_scores(values[number], positions[number], similarity, offset)
    given = zip(positions, values, [task.matches[block] for block in rows], most, strict=True)
    relevant = [full_list.sort_relevant(position, value, count, max(1, r)) for position, value, count, r in given]
    outranking = [item.total.new_zeros(len(item.total), item.position.shape[1] + 1) for item in relevant]
    for number, offset, similarity in stream(numbers):
        neighbors.leave_out(similarity, positions[number], offset)
        outranking[number] += full_list.count_outranking(relevant[number], similarity, offset)
    return [full_list_scores(r, o, extra) for r, o in zip(relevant, outranking, strict=True)]
