"""Ranking of adaptive distances to clusters (NAMR).

The mechanism is that of NASA: Li et al., "Neighborhood-Adaptive Structure Augmented Metric Learning", AAAI 2022, whose
published code gives the case of two centres. Its successor NAMR (IEEE TCSVT 2022), of which only the abstract was at
hand, ranks to several.
  d_ij = sqrt(sum_k s_ik (z_ik - z_jk)^2);  c = softmax_m(-alpha |d_ij - eta_m|);  L = mean_ij sum_m c_m |d_ij - eta_m|
But:
- More than two centres are ours: evenly spaced between the outer two, or quantiles of the batch's distances.
- Distances come from matrix products of centred embeddings, O(B^2) memory; the published code holds B x B x D.
- A distance that is zero up to rounding is zero, with the gradient zero.
- The mean distance that z is divided by while training is part of the gradient: the term knows no scale of z, and
  cannot be lowered by shrinking it.
"""

from typing import Any

import torch
from torch import Tensor, nn

SPACINGS = ("even", "quantile")


class AdaptiveSquares(torch.autograd.Function):
    """sum_k s_ik (z_ik - z_jk)^2, (B, B), of centred z and s (B, D), and the sum of its positive terms, (B, B).

    With H = dL/d(squares), r = H 1 and q = z^2:  dL/ds = r q - 2 z (H z) + H q,
    dL/dz = 2 (r s z - s (H z) + z (H' s) - H' (s z)).
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        q, weighted = z * z, s * z
        total = torch.addmm((weighted * z).sum(1, keepdim=True), s, q.T)
        ctx.save_for_backward(z, s, q, weighted)
        ctx.mark_non_differentiable(total)
        return torch.addmm(total, weighted, z.T, alpha=-2), total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        h, (z, s, q, weighted) = gradients[0], ctx.saved_tensors
        r, hz = h.sum(1, keepdim=True), h @ z
        to_z = torch.addmm(r * weighted, h.T, weighted, beta=1, alpha=-1).addcmul_(s, hz, value=-1)
        to_s = torch.addmm(r * q, h, q).addcmul_(z, hz, value=-2)
        return to_z.addcmul_(z, h.T @ s).mul_(2), to_s


class SafeSqrt(torch.autograd.Function):
    """Square root of squared distances (B, B), where what is but a rounding error of `total` (B, B) gives zero.

    The gradient there is zero. Masks are factors: on a CPU `where` takes ten times as long as a product.
    """

    @staticmethod
    def forward(ctx: Any, square: Tensor, total: Tensor) -> Tensor:
        positive = torch.sub(square, total, alpha=8 * torch.finfo(square.dtype).eps).clamp_min_(0).sign_()
        distance = positive.fill_diagonal_(0).mul_(square).sqrt_()
        ctx.save_for_backward(distance)
        return distance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), (distance,) = gradients, ctx.saved_tensors
        twice = (2 * distance).clamp_min_(torch.finfo(distance.dtype).tiny)
        return distance.sign().mul_(gradient).div_(twice), None


def adaptive_distance(z: Tensor, s: Tensor) -> Tensor:
    """Return the adaptive distances d_ij = sqrt(sum_k s_ik (z_ik - z_jk)^2), which are not symmetric.

    Args:
        z: (B, D) sample embeddings.
        s: (B, D) structure embeddings, > 0: row i weighs the dimensions by s_i.

    Returns:
        (B, B) distances with a zero diagonal.
    """
    with torch.autocast(z.device.type, enabled=False):
        z, s = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (z, s))
        z = z - z.detach().mean(0)  # distances stay, rounding errors shrink
        return SafeSqrt.apply(*AdaptiveSquares.apply(z, s))


def plain_distance(z: Tensor) -> Tensor:
    """Return the Euclidean distances (B, B) of z (B, D): the adaptive ones with s = 1."""
    with torch.autocast(z.device.type, enabled=False):
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        z = z - z.detach().mean(0)
        norm = (z * z).sum(1)
        total = norm[:, None] + norm
        return SafeSqrt.apply(torch.addmm(total, z, z.T, alpha=-2), total.detach())


def cluster_centers(distance: Tensor, centers: int, t: float, spacing: str) -> Tensor:
    """Return the distances that the pairs are ranked to.

    Args:
        distance: (B, B) plain distances with their zero diagonal.
        centers: M.
        t: Standard deviations between the mean and the last centre, if spaced evenly.
        spacing: even: from the mean to max(0.2 mean, mean - t std). quantile: the middles of M equal shares of the
            distances.

    Returns:
        (M,) centres, farthest first.
    """
    if spacing == "even":
        mean = distance.mean()
        last = torch.maximum(0.2 * mean, mean - t * distance.std())
        return torch.lerp(mean, last, torch.linspace(0, 1, centers, dtype=distance.dtype, device=distance.device))
    pairs = distance.flatten()[1:].view(len(distance) - 1, -1)[:, :-1].flatten()  # without the diagonal
    orders = [int((centers - m - 0.5) / centers * len(pairs)) + 1 for m in range(centers)]
    return torch.stack([pairs.kthvalue(k).values for k in orders])


def cluster_ranking_loss(
    z: Tensor, s: Tensor, centers: int = 2, t: float = 3.0, alpha: float = 10.0, spacing: str = "even"
) -> Tensor:
    """Return NAMR's loss: each adaptive distance is drawn to the nearest of M centres.

    Args:
        z: (B, D) sample embeddings.
        s: (B, D) structure embeddings, > 0.
        centers: M.
        t: As in `cluster_centers`.
        alpha: How sharply the nearest centre is preferred.
        spacing: even or quantile, as in `cluster_centers`.

    Returns:
        A scalar, 0 for one sample.

    Raises:
        ValueError: The spacing is unknown.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, not {spacing!r}")
    pairs = len(z) * (len(z) - 1)
    if pairs == 0:
        return 0 * (z.sum() + s.sum())
    with torch.no_grad():
        eta = cluster_centers(plain_distance(z), centers, t, spacing)
    return DistanceToCenters.apply(adaptive_distance(z, s), eta, alpha)


class DistanceToCenters(torch.autograd.Function):
    """Mean over the off-diagonal pairs of f(d) = sum_m c_m g_m; g_m = |d - eta_m|, c = softmax_m(-alpha g).

    f'(d) = sum_m sign(d - eta_m) c_m (1 + alpha (f - g_m)). distance (B, B), eta (M,), which gets no gradient.
    What is below exp(-60) is raised to that, which changes no sum: a CPU is slow with denormal numbers.
    """

    @staticmethod
    def forward(ctx: Any, distance: Tensor, eta: Tensor, alpha: float) -> Tensor:
        difference = distance - eta[:, None, None]
        gap = difference.abs()
        share = (gap - gap.amin(0)).mul_(-alpha).clamp_min_(-60).softmax(0)
        loss = (share * gap).sum(0)
        slope = share.mul_((loss - gap).mul_(alpha).add_(1)).mul_(difference.sign_()).sum(0)
        pairs = loss.numel() - len(loss)
        ctx.save_for_backward(slope.fill_diagonal_(0).div_(pairs))
        return loss.fill_diagonal_(0).sum() / pairs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), (slope,) = gradients, ctx.saved_tensors
        return gradient * slope, None, None


class ClusterRanking(nn.Module):
    """NAMR: the structure head, and the ranking of the adaptive distances that it gives.

    Args:
        structure: Maps features (B, F) of the global batch to weights (B, D) > 0 of the dimensions.
        centers: As in `cluster_ranking_loss`.
        t: As in `cluster_ranking_loss`.
        alpha: As in `cluster_ranking_loss`.
        spacing: As in `cluster_ranking_loss`.
    """

    def __init__(self, structure: nn.Module, centers: int, t: float, alpha: float, spacing: str):
        super().__init__()
        self.structure = structure
        self.centers, self.t, self.alpha, self.spacing = centers, t, alpha, spacing

    def forward(self, z: Tensor, features: Tensor) -> Tensor:
        """Return the loss, a scalar, of z (B, D), which is divided by its mean distance, and features (B, F)."""
        s = self.structure(features)
        pairs = len(z) * (len(z) - 1)
        if pairs == 0:
            return 0 * (z.sum() + s.sum())
        plain = plain_distance(z)
        scale = plain.sum() / pairs
        scale = torch.where(scale > 0, scale, 1)
        with torch.no_grad():
            eta = cluster_centers(plain / scale, self.centers, self.t, self.spacing)
        return DistanceToCenters.apply(adaptive_distance(z / scale, s), eta, self.alpha)
