"""Choose the candidates of each anchor when synthetic embeddings are among them, by masks on the matrix of pairs.

Anchors are the B real embeddings, candidates the B real and M*B synthetic ones: R in all; candidate m*B + i is anchor i
itself (m = 0) or its copy. Sources: pytorch-metric-learning's miners and losses, to which tests hold this equal.
But:
- MultiSimilarityMiner lists all pairs and sorts them, which takes half of a step; TripletMarginMiner makes a B x R x R
  mask. Here both are conditions on (B, R).
- ContrastiveLoss lists its pairs as well, for which the host has to wait for the device.
- MultiSimilarityLoss fills what it leaves out with the least float, whose exponential is an order of magnitude slower
  than another on a CPU.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize


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
    nearest = similarity.masked_fill(~negative, -torch.inf).amax(1, keepdim=True)
    farthest = similarity.masked_fill(~positive, torch.inf).amin(1, keepdim=True)
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
    top = x.masked_fill(~keep, 0).amax(1, keepdim=True).clamp_min_(0)
    terms = x.sub_(top).clamp_max_(0).exp_().mul_(keep)
    total = terms.sum(1, keepdim=True).add_(torch.exp(-top))
    return (top + total.log())[:, 0], terms.div_(total)
