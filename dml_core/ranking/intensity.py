"""Ranking of synthetics by their intensity (SGAR).

Liu et al., "Self-supervised Generative Assisted Ranking", Eng. Appl. of AI 131 (2024) 107885, arXiv 2304.10941.
h(x) = relu(normalise(F x)), similarity c_j = <h(r_j), h(z)> of the j-th synthetic r_j to its source z.
But:
- Two-sided on request (`max_gap`): the order is kept without tearing the class apart.
- With a pair loss, which has no proxies, the mean of the class's unit embeddings in the batch stands in for its proxy.
- Every sum of exponentials is a logsumexp: no overflow at any scale.
- F is applied to the directions, not to the synthetics, and of z to its direction, as h knows no length:
  F r_j / ||z|| = F zh + j r F u_j, which is the same and has a cheaper gradient.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, relu

from dml_core.synthesis import radial


def intensity_ranking_loss(
    similarity: Tensor, margin: float, scale: float, max_gap: float | None = None, gate: Tensor | None = None
) -> Tensor:
    """Return SGAR's ranking loss: a stronger synthetic lies farther from its source than a weaker one, by the margin.

    L = (1/scale) log(1 + sum_{i<j} exp(scale (c_j - c_i + margin)))
      [+ (1/scale) log(1 + sum_{i<j} exp(scale (c_i - c_j - j max_gap)))]

    Args:
        similarity: (N, S) c: of synthetic j to its source, weakest first.
        margin: What a step of intensity should cost in similarity, at least.
        scale: Sharpness of the soft maximum.
        max_gap: What a step may cost, at most; None: no limit.
        gate: (S,) bool, the sources that count; None: all.

    Returns:
        A scalar, the mean over the sources that count.
    """
    drop = similarity[:, None] - similarity  # (i, j, S)
    no_pair = torch.ones(drop.shape[:2], dtype=torch.bool, device=drop.device).tril_()[..., None]
    loss = SoftHinge.apply((margin - drop).masked_fill(no_pair, -torch.inf).flatten(0, 1), scale)
    if max_gap is not None:
        steps = torch.arange(1, len(similarity) + 1, dtype=drop.dtype, device=drop.device)
        excess = drop - max_gap * steps[:, None]
        loss = loss + SoftHinge.apply(excess.masked_fill(no_pair, -torch.inf).flatten(0, 1), scale)
    return gated_mean(loss, gate)


class SoftHinge(torch.autograd.Function):
    """(1/scale) log(1 + sum_n exp(scale v_n)), (S,), of violations v (n, S); its gradient is made with it."""

    @staticmethod
    def forward(ctx: Any, violation: Tensor, scale: float) -> Tensor:
        exponent = scale * violation
        top = exponent.amax(0).clamp_min_(0)
        terms = exponent.sub_(top).exp_()
        total = terms.sum(0).add_(torch.exp(-top))
        ctx.save_for_backward(terms.div_(total))
        return total.log_().add_(top).div_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), (shares,) = gradients, ctx.saved_tensors
        return gradient * shares, None


def gated_mean(loss: Tensor, gate: Tensor | None) -> Tensor:
    """Return the mean of loss (S,) over the open gates (S,); a differentiable zero where all are closed."""
    return loss.mean() if gate is None else (loss * gate).sum() / gate.sum().clamp(min=1)


def class_shares(labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (B, B): times rows x (B, D), it gives each sample the mean of its class in the batch, itself included."""
    same = (labels[:, None] == labels).to(dtype)
    return same.div_(same.sum(1, keepdim=True))


class RectifiedCosine(torch.autograd.Function):
    """<relu(x / ||x||), e>, (E, N, B), of x (N, B, D) and ends e (E, B, D). Takes half of autograd's passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor) -> Tensor:
        length = x.norm(dim=2).clamp_min(torch.finfo(x.dtype).tiny)
        positive = relu(x)
        cosine = torch.bmm(positive.transpose(0, 1), ends.permute(1, 2, 0)).permute(2, 1, 0) / length
        ctx.save_for_backward(x, positive, ends, length, cosine)
        return cosine

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,), (x, positive, ends, length, cosine) = gradients, ctx.saved_tensors
        share = gradient / length
        to_x = torch.bmm(share.permute(2, 1, 0), ends.transpose(0, 1)).transpose(0, 1)
        to_x = torch.ops.aten.threshold_backward(to_x, x, 0)  # zero where x <= 0, by one pass
        to_x.addcmul_(x, ((share * cosine).sum(0) / length)[..., None], value=-1)
        return to_x, torch.bmm(share.permute(2, 0, 1), positive.transpose(0, 1)).transpose(0, 1)


class IntensityRanking(nn.Module):
    """SGAR: the synthesis, the projection F, and both terms.

    The ranking term is `intensity_ranking_loss`. The anchor term keeps synthetics in their class:
    (1/a) log(1 + sum_j exp(a (m - <h(r_j), h(p_y)>))). Only sources whose cosine to their class's proxy is at least
    `gate` count, in both terms.

    Args:
        dim: D.
        intensity: r, the step between two synthetics of a source.
        count: N, how many synthetics a source gets.
        margin: As in `intensity_ranking_loss`.
        max_gap: As in `intensity_ranking_loss`.
        scale: As in `intensity_ranking_loss`.
        gate: The least cosine of a source to its class's proxy.
        anchor_scale: a.
        anchor_margin: m.
        shared_directions: Whether all sources share the directions of their synthetics.
    """

    def __init__(
        self,
        dim: int,
        intensity: float,
        count: int,
        margin: float,
        max_gap: float | None,
        scale: float,
        gate: float,
        anchor_scale: float,
        anchor_margin: float,
        shared_directions: bool,
    ):
        super().__init__()
        self.projection = nn.Parameter(nn.init.orthogonal_(torch.empty(dim, dim)))
        self.intensity, self.count, self.shared_directions = intensity, count, shared_directions
        self.margin, self.max_gap, self.scale, self.gate = margin, max_gap, scale, gate
        self.anchor_scale, self.anchor_margin = anchor_scale, anchor_margin

    def forward(
        self, z: Tensor, labels: Tensor, proxies: Tensor | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute both terms.

        Args:
            z: (B, D) raw embeddings.
            labels: (B,) classes.
            proxies: (C, D), or None: the classes' means in the batch.
            generator: Draws the directions.

        Returns:
            The ranking term, the anchor term and the share of sources that count, each a scalar.
        """
        zh = normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)
        if proxies is None:
            shares, sources = class_shares(labels, zh.dtype), zh @ self.projection.T
            anchors = shares @ zh.detach()
            projected = torch.stack([sources, shares @ sources])  # the mean of projections is the mean's projection
        else:
            anchors = proxies[labels]
            projected = (torch.cat([zh, anchors]) @ self.projection.T).unflatten(0, (2, -1))
        gate = (zh.detach() * normalize(anchors.detach(), dim=1)).sum(1) >= self.gate
        offsets = radial.draw_offsets(zh, self.intensity, self.count, generator, self.shared_directions)
        synthetics = projected[0] + offsets @ self.projection.T
        to_source, to_class = RectifiedCosine.apply(synthetics, relu(normalize(projected, dim=2)))
        rank = intensity_ranking_loss(to_source, self.margin, self.scale, self.max_gap, gate)
        anchor = gated_mean(SoftHinge.apply(self.anchor_margin - to_class, self.anchor_scale), gate)
        return rank, anchor, gate.to(zh.dtype).mean()
