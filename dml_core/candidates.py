"""Losses with synthetic embeddings among the candidates, as masks and counts on the matrix of pairs.

Anchors are the B real embeddings, candidates the B real and M*B synthetic ones: R in all; candidate m*B + i is anchor i
itself (m = 0) or its copy. Sources: pytorch-metric-learning's miners and losses, to which tests hold this equal.
But:
- Nothing here waits for the device, as no shape depends on what the numbers are: how often a pair counts is a number
  in a matrix (B, R), not a list. The functions that list or keep pairs, for losses without a form here, do wait.
- MultiSimilarityMiner lists all pairs and sorts them, which takes half of a step; TripletMarginMiner makes a B x R x R
  mask. Here both are conditions on (B, R).
- TripletMarginLoss lists its triplets. Here each anchor's distances are sorted, and a pair's triplets counted.
- DistanceWeightedMiner draws class by class in a loop. Here all anchors draw at once, with the same probabilities.
- MultiSimilarityLoss fills what it leaves out with the least float, whose exponential is an order of magnitude slower
  than another on a CPU.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

BLOCK = 2**24  # numbers: pairs whose triplets are counted at a time


def own_copies(matrix: Tensor) -> Tensor:
    """Return a mask (B, R) of each anchor's own copies: candidate m*B + i is sample i (m = 0) or a copy of it."""
    anchors, candidates = (torch.arange(size, device=matrix.device) for size in matrix.shape)
    return candidates % len(anchors) == anchors[:, None]


def hide_copies(distance: Any, inputs: tuple[Tensor, Tensor], matrix: Tensor) -> Tensor:
    """Make own copies as near as can be, so that no miner takes one for a hard positive.

    Args:
        distance: A miner's distance of pytorch-metric-learning, which this is a forward hook of.
        inputs: What the distance was called with.
        matrix: (B, R) distances, or similarities where `distance.is_inverted`.

    Returns:
        (B, R), the copies replaced.
    """
    nearest = torch.finfo(matrix.dtype).max * (1 if distance.is_inverted else -1)
    return matrix.masked_fill(own_copies(matrix), nearest)


def all_pairs(positive: Tensor, negative: Tensor) -> tuple[Tensor, ...]:
    """List all pairs of two masks (B, R): (anchors, positives, anchors, negatives), indices of rows and columns."""
    return *torch.where(positive), *torch.where(negative)


def all_triplets(positive: Tensor, negative: Tensor) -> tuple[Tensor, ...]:
    """List all triplets of two masks (B, R): (anchors, positives, negatives), indices of rows and columns."""
    anchor, near = torch.where(positive)
    pair, far = torch.where(negative[anchor])
    return anchor[pair], near[pair], far


def without_copies(indices: tuple[Tensor, ...], anchors: int) -> tuple[Tensor, ...]:
    """Leave out mined pairs or triplets whose positive is a copy of the anchor, which then had no other positive.

    Args:
        indices: (anchors, positives, anchors, negatives) or (anchors, positives, negatives).
        anchors: B, how many anchors there are.

    Returns:
        The others, in the same form.
    """
    anchor, positive, *negatives = indices
    keep = positive % anchors != anchor
    return anchor[keep], positive[keep], *((n[keep] for n in negatives) if len(negatives) == 1 else negatives)


def informative_pairs(similarity: Tensor, positive: Tensor, negative: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Choose pairs as MultiSimilarityMiner does.

    Kept are positives less similar than the nearest negative plus epsilon, and negatives more similar than the farthest
    positive minus epsilon.

    Args:
        similarity: (B, R).
        positive: (B, R) bool.
        negative: (B, R) bool.
        epsilon: The tolerance.

    Returns:
        The kept positives and negatives, (B, R) masks.
    """
    huge = torch.finfo(similarity.dtype).max  # on a CPU, filling by a mask takes ten times as long as adding it
    nearest = torch.sub(similarity, (~negative).to(similarity.dtype), alpha=huge).amax(1, keepdim=True)
    farthest = torch.add(similarity, (~positive).to(similarity.dtype), alpha=huge).amin(1, keepdim=True)
    return positive & (similarity - epsilon < nearest), negative & (similarity + epsilon > farthest)


def violating_triplets(distance: Tensor, positive: Tensor, negative: Tensor, miner: Any) -> tuple[Tensor, ...]:
    """Choose triplets as TripletMarginMiner does. Memory: pairs x R.

    Args:
        distance: (B, R).
        positive: (B, R) bool.
        negative: (B, R) bool.
        miner: The miner, for its `margin` and `type_of_triplets`.

    Returns:
        (anchors, positives, negatives), indices of rows and columns.
    """
    anchor, near = torch.where(positive)
    gap = distance[anchor] - distance[anchor, near][:, None]
    mask = negative[anchor] & ((gap > miner.margin) if miner.type_of_triplets == "easy" else (gap <= miner.margin))
    if miner.type_of_triplets == "hard":
        mask &= gap <= 0
    if miner.type_of_triplets == "semihard":
        mask &= gap > 0
    pair, far = torch.where(mask)
    return anchor[pair], near[pair], far


def triplet_range(margin: float, miner: Any) -> tuple[float, float, bool]:
    """Return the gaps d_an - d_ap of the triplets that a miner chooses and that cost something: low < gap < high.

    Args:
        margin: That of the loss, relu(d_ap - d_an + margin).
        miner: A TripletMarginMiner of pytorch-metric-learning; None: all triplets are chosen.

    Returns:
        low, high, and whether a gap of `high` belongs to them.
    """
    low, ends = -math.inf, [(margin, False)]
    if miner is not None and miner.type_of_triplets == "easy":
        low = miner.margin
    elif miner is not None:
        low = 0 if miner.type_of_triplets == "semihard" else low
        ends += [(miner.margin, True), (0, True)] if miner.type_of_triplets == "hard" else [(miner.margin, True)]
    return low, *min(ends)


def count_triplets(
    distance: Tensor, positive: Tensor, negative: Tensor, low: float, high: float, closed: bool
) -> Tensor:
    """Count the triplets of each pair, without listing them. Time: O(B R log R).

    The distances of an anchor to its positives, and to its negatives, are sorted. How many are within reach of a
    pair's own distance is then the difference of two positions.

    Args:
        distance: (B, R).
        positive: (B, R) bool.
        negative: (B, R) bool.
        low: A triplet's gap, the negative's distance minus the positive's, is above it.
        high: The gap is below it.
        closed: Whether the gap may be `high` itself.

    Returns:
        (B, R) int32, for a positive pair its triplets, for a negative pair minus its triplets, else 0.
    """
    search = partial(torch.searchsorted, out_int32=True)
    low = max(low, torch.finfo(distance.dtype).min)
    near, far = (distance.masked_fill(~mask, torch.inf).sort(1).values for mask in (positive, negative))
    of_positive = search(far, distance + high, right=closed) - search(far, distance + low, right=True)
    of_negative = search(near + low, distance) - search(near + high, distance, right=not closed)
    return torch.where(positive, of_positive, 0) - torch.where(negative, of_negative, 0)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Return the cosines (B, R) of x (B, D) and y (R, D). y's norms divide the product, which has fewer numbers."""
    length = y.norm(dim=1).clamp_min(torch.finfo(y.dtype).eps ** 1.5)
    return normalize(x, dim=1) @ y.T / length


def contrastive(similarity: Tensor, positive: Tensor, negative: Tensor, near: float, far: float) -> Tensor:
    """Sum relu(near - s) over positives and relu(s - far) over negatives.

    Args:
        similarity: (B, R) s.
        positive: (B, R) bool.
        negative: (B, R) bool.
        near: Positives nearer than this cost nothing.
        far: Negatives farther than this cost nothing.

    Returns:
        A scalar.
    """
    pull = (near - similarity).relu() * positive.to(similarity.dtype)
    push = (similarity - far).relu() * negative.to(similarity.dtype)
    return pull.sum() + push.sum()


def triplet_margin(distance: Tensor, positive: Tensor, negative: Tensor, margin: float, miner: Any) -> Tensor:
    """Return the mean of relu(d_ap - d_an + margin) over the chosen triplets where it is positive; 0 if there are none.

    A sum over triplets is linear in the distances: each counts as often as its pair is in a triplet.

    Args:
        distance: (B, R) d.
        positive: (B, R) bool.
        negative: (B, R) bool.
        margin: The margin.
        miner: As in `triplet_range`.

    Returns:
        A scalar.
    """
    low, high, closed = triplet_range(margin, miner)
    if low >= high:
        return 0 * distance.sum()
    with torch.no_grad():
        blocks = (x.split(max(1, BLOCK // x.shape[1])) for x in (distance, positive, negative))
        counts = torch.cat([count_triplets(d, p, n, low, high, closed) for d, p, n in zip(*blocks)])
        total = counts.clamp(min=0).sum()
        weights = counts.to(distance.dtype) / total.clamp(min=1)
    return (weights * distance).sum() + margin * (total > 0).to(distance.dtype)


def distance_weights(distance: Tensor, negative: Tensor, dim: int, miner: Any) -> Tensor:
    """Return the weights that DistanceWeightedMiner draws negatives with, before they are divided by their sum.

    w = 1 / q(d), q(d) = d^(D-2) (1 - d^2 / 4)^((D-3)/2), the density of distances on the unit sphere, where d < limit.
    Wu et al., "Sampling Matters in Deep Embedding Learning", ICCV 2017. Like the library's they are scaled by the
    greatest of the batch, below which they may underflow: an anchor without any is left out.

    Args:
        distance: (B, R) d, of unit embeddings.
        negative: (B, R) bool.
        dim: D.
        miner: The miner, for its `cutoff`, which shorter distances count as, and its `nonzero_loss_cutoff`, the limit.

    Returns:
        (B, R), 0 where a candidate cannot be drawn.
    """
    d = distance.clamp(min=miner.cutoff)
    log_weights = (2.0 - dim) * d.log() - (dim - 3) / 2 * (1 - 0.25 * d**2).log()
    finite = log_weights.isfinite()
    top = torch.where(finite, log_weights * negative, -torch.inf).amax()
    return torch.where(finite & negative & (d < miner.nonzero_loss_cutoff), (log_weights - top).exp(), 0)


def draw_columns(weights: Tensor) -> Tensor:
    """Draw R columns for each row, with replacement, with the probabilities weights / their sum.

    Uniform numbers are looked up in the weights' running sums. Those are sums of integers, whose bits do not depend on
    the order in which a device adds. The numbers are of torch's default generator of the device, as the library's are.

    Args:
        weights: (B, R), at least 0.

    Returns:
        (B, R) int64, R where a row has no weights.
    """
    top = weights.amax(1, keepdim=True)
    bounds = (weights / torch.where(top > 0, top, 1)).mul(2**32).long().cumsum(1)
    points = torch.rand(weights.shape, dtype=torch.float64, device=weights.device).mul_(bounds[:, -1:]).long()
    return torch.searchsorted(bounds, points, right=True)


def draw_triplets(weights: Tensor, positive: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Draw triplets as DistanceWeightedMiner does, and count in how many each pair is.

    An anchor draws as many triplets as there are candidates of its class. Positives are drawn evenly, negatives by
    their weights. Among synthetics an own copy may be drawn for a positive, and the triplet is left out.

    Args:
        weights: (B, R) of the negatives, as of `distance_weights`.
        positive: (B, R) bool.
        same: (B, R) bool, the positives and own copies.

    Returns:
        (B, R) triplets of each pair with a positive, and of each pair with a negative, of the weights' type.
    """
    candidates = weights.shape[1]
    near = draw_columns((same if candidates > len(same) else positive).to(weights.dtype))
    far = draw_columns(weights)
    drawn = same & (near < candidates) & (far < candidates)
    near, far = near.clamp_max_(candidates - 1), far.clamp_max_(candidates - 1)
    drawn = (drawn & positive.gather(1, near)).to(weights.dtype)
    none = torch.zeros_like(weights)
    return none.scatter_add(1, near, drawn), none.scatter_add(1, far, drawn)


def margin_loss(distance: Tensor, beta: Tensor, near: Tensor, far: Tensor, margin: float, nu: float) -> Tensor:
    """Return MarginLoss: of triplets, the mean of what is positive of d_ap - beta + margin and beta - d_an + margin.

    Args:
        distance: (B, R) d.
        beta: (B, 1) or (1, 1), the distance that parts positives from negatives.
        near: (B, R) how many triplets have the pair for their positive one.
        far: (B, R) how many triplets have the pair for their negative one.
        margin: The margin.
        nu: Weight of a term of beta: where each anchor has its own, their sum over the triplets, as part of the mean;
            where there is one, itself, beside the mean.

    Returns:
        A scalar, 0 where no triplet costs anything.
    """
    pull, push = (distance - beta + margin).relu(), (beta - distance + margin).relu()
    active = ((pull > 0) * near + (push > 0) * far).sum()
    total = (pull * near + push * far).sum()
    if nu and len(beta) > 1:
        total = total + nu * (near.sum(1, keepdim=True) * beta).sum()
    loss = torch.where(active > 0, total / active.clamp(min=1), 0)
    return torch.where(near.sum() > 0, loss + nu * beta.sum(), loss) if nu and len(beta) == 1 else loss


def proxy_anchor(similarity: Tensor, labels: Tensor, margin: float, scale: float) -> Tensor:
    """Return ProxyAnchorLoss, where each proxy draws its class and repels the others.

    mean over classes in the batch of log(1 + sum_own exp(-scale (s - margin)))
    + mean over all classes of log(1 + sum_other exp(scale (s + margin))).

    Args:
        similarity: (R, C) s, of samples to proxies.
        labels: (R,) classes.
        margin: The margin.
        scale: Sharpness of the soft maxima.

    Returns:
        A scalar.
    """
    own = labels[:, None] == torch.arange(similarity.shape[1], device=labels.device)
    pull = log_one_plus_sum(scale * (margin - similarity), own)
    push = log_one_plus_sum(scale * (similarity + margin), ~own)
    return pull.sum() / own.any(0).sum() + push.mean()


def log_one_plus_sum(x: Tensor, keep: Tensor) -> Tensor:
    """Return log(1 + sum over kept i of exp(x_ij)), (C,), of x (R, C)."""
    terms = x.masked_fill(~keep, torch.finfo(x.dtype).min)
    return torch.cat([torch.zeros_like(terms[:1]), terms]).logsumexp(0)


class MultiSimilarity(torch.autograd.Function):
    """(1/alpha) log(1 + sum_pos exp(-alpha (s - base))) + (1/beta) log(1 + sum_neg exp(beta (s - base))).

    Wang et al., "Multi-Similarity Loss with General Pair Weighting", CVPR 2019, eq. 15, and as its gradient eq. 16's
    weights. similarity s, positive, negative: (B, R). Returns (B,).
    """

    @staticmethod
    def forward(
        ctx: Any, similarity: Tensor, positive: Tensor, negative: Tensor, alpha: float, beta: float, base: float
    ) -> Tensor:
        excess = similarity - base
        near, near_share = soft_count(-alpha * excess, positive)
        far, far_share = soft_count(beta * excess, negative)
        ctx.save_for_backward(far_share.sub_(near_share))
        return near / alpha + far / beta

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (weights,) = gradients, ctx.saved_tensors
        return weights * gradient[:, None], None, None, None, None, None


def soft_count(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(1 + sum over kept j of exp(x_ij)), (B,), and its gradient, (B, R), without overflow. Overwrites x."""
    factors = keep.to(x.dtype)
    top = (x * factors).amax(1, keepdim=True).clamp_min_(0)
    terms = x.sub_(top).clamp_max_(0).exp_().mul_(factors)
    total = terms.sum(1, keepdim=True).add_(torch.exp(-top))
    return (top + total.log())[:, 0], terms.div_(total)
