"""Which candidates count for which anchor, when synthetic ones are among them, by masks on the matrix of pairs.

Anchors are the B real embeddings, candidates the B real and M*B synthetic ones: R in all; candidate m*B + i is anchor i
itself (m = 0) or its copy. Sources: pytorch-metric-learning's miners and losses, to which tests hold this equal.
But:
- MultiSimilarityMiner lists all pairs and sorts them, which takes half of a step; TripletMarginMiner makes a B x R x R
  mask. Here both are conditions on (B, R).
- ContrastiveLoss lists its pairs as well, which a device has to be waited for.
- MultiSimilarityLoss fills what it leaves out with the least float, whose exponential is an order of magnitude slower
  than another on a CPU.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize


def own_copies(matrix: Tensor) -> Tensor:
    """(B, R) mask: candidate m*B + i is sample i itself (m = 0) or one of its synthetic copies."""
    anchors, candidates = (torch.arange(size, device=matrix.device) for size in matrix.shape)
    return candidates % len(anchors) == anchors[:, None]


def hide_copies(distance: Any, inputs: tuple[Tensor, Tensor], matrix: Tensor) -> Tensor:
    """Forward hook of a miner's distance: own copies become as near as can be, hence never a hard positive."""
    nearest = torch.finfo(matrix.dtype).max * (1 if distance.is_inverted else -1)
    return matrix.masked_fill(own_copies(matrix), nearest)


def all_pairs(positive: Tensor, negative: Tensor) -> tuple[Tensor, ...]:
    """Masks (B, R) -> (anchors, positives, anchors, negatives)."""
    return *torch.where(positive), *torch.where(negative)


def all_triplets(positive: Tensor, negative: Tensor) -> tuple[Tensor, ...]:
    """Masks (B, R) -> (anchors, positives, negatives)."""
    anchor, near = torch.where(positive)
    pair, far = torch.where(negative[anchor])
    return anchor[pair], near[pair], far


def without_copies(indices: tuple[Tensor, ...], anchors: int) -> tuple[Tensor, ...]:
    """Leave out mined pairs and triplets whose positive is a copy of the anchor (one that had no other positive)."""
    anchor, positive, *negatives = indices
    keep = positive % anchors != anchor
    return anchor[keep], positive[keep], *((n[keep] for n in negatives) if len(negatives) == 1 else negatives)


def informative_pairs(similarity: Tensor, positive: Tensor, negative: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """MultiSimilarityMiner: positives less similar than the nearest negative, negatives more so than the farthest
    positive, both give or take epsilon. All (B, R)."""
    nearest = similarity.masked_fill(~negative, -torch.inf).amax(1, keepdim=True)
    farthest = similarity.masked_fill(~positive, torch.inf).amin(1, keepdim=True)
    return positive & (similarity - epsilon < nearest), negative & (similarity + epsilon > farthest)


def violating_triplets(distance: Tensor, positive: Tensor, negative: Tensor, miner: Any) -> tuple[Tensor, ...]:
    """TripletMarginMiner: (B, R) distance and masks -> (anchors, positives, negatives). Memory: pairs x R."""
    anchor, near = torch.where(positive)
    gap = distance[anchor] - distance[anchor, near][:, None]
    chosen = negative[anchor] & ((gap > miner.margin) if miner.type_of_triplets == "easy" else (gap <= miner.margin))
    if miner.type_of_triplets == "hard":
        chosen &= gap <= 0
    if miner.type_of_triplets == "semihard":
        chosen &= gap > 0
    pair, far = torch.where(chosen)
    return anchor[pair], near[pair], far


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """(B, D), (R, D) -> (B, R). The long side is scaled after the product: R numbers a row instead of R*D in all."""
    length = y.norm(dim=1).clamp_min(torch.finfo(y.dtype).eps ** 1.5)
    return normalize(x, dim=1) @ y.T / length


def contrastive(similarity: Tensor, positive: Tensor, negative: Tensor, near: float, far: float) -> Tensor:
    """Sum over positives of relu(near - s) and over negatives of relu(s - far). All (B, R) -> scalar."""
    pull = (near - similarity).relu() * positive.to(similarity.dtype)
    push = (similarity - far).relu() * negative.to(similarity.dtype)
    return pull.sum() + push.sum()


class MultiSimilarity(torch.autograd.Function):
    """(1/alpha) log(1 + sum_pos exp(-alpha (s - base))) + (1/beta) log(1 + sum_neg exp(beta (s - base))).

    Wang et al., "Multi-Similarity Loss with General Pair Weighting", CVPR 2019, eq. 15, and as its gradient eq. 16's
    weights. similarity, positive, negative (B, R) -> (B,).
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx, similarity: Tensor, positive: Tensor, negative: Tensor, alpha: float, beta: float, base: float
    ) -> Tensor:
        excess = similarity - base
        near, near_share = soft_count(-alpha * excess, positive)
        far, far_share = soft_count(beta * excess, negative)
        ctx.save_for_backward(far_share.sub_(near_share))
        return near / alpha + far / beta

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def, override]
        (weights,) = ctx.saved_tensors
        return weights * gradient[:, None], None, None, None, None, None


def soft_count(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """log(1 + sum over kept j of exp(x_ij)) (B,) and its gradient (B, R), stable. Overwrites x."""
    top = x.masked_fill(~keep, 0).amax(1, keepdim=True).clamp_min_(0)
    terms = x.sub_(top).clamp_max_(0).exp_().mul_(keep)
    total = terms.sum(1, keepdim=True).add_(torch.exp(-top))
    return (top + total.log())[:, 0], terms.div_(total)
