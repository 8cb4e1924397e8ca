"""Synthetic embeddings drawn from the variation of their class.

Fu et al., "Intra-class Adaptive Augmentation with Neighbor Correction for Deep Metric Learning", IEEE TMM 2022:
  zhat = z + sqrt(lambda V_y) eps,  eps ~ N(0, I).
But:
- Every draw has the same variance. The published code takes one more square root for each draw.
- lambda is inside the root, as in the paper.
- Full covariances are an option of ours.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dml_core.variation import ClassVariation, neighbor_correction

JITTER = 1e-6  # of the mean variance: a class with fewer samples than dimensions has a singular covariance


def synthesize(
    z: Tensor, labels: Tensor, variance: Tensor, intensity: float, draws: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """M = `draws` synthetics for each sample: (M*B, D), row m*B + i a copy of sample i, and their labels (M*B,).

    z (B, D) raw; labels (B,); variance (C, D), or (C, D, D) at a memory of B D^2; intensity lambda. Gradient through z.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    noise = torch.randn(draws, *z.shape, generator=generator, device=z.device, dtype=z.dtype)
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        if variance.ndim == 2:
            step = noise * (intensity * variance[labels]).sqrt().to(z.dtype)
        else:
            step = torch.einsum("mbd, bed -> mbe", noise, intensity**0.5 * cholesky(variance[labels]).to(z.dtype))
    return (z + step).flatten(0, 1), labels.repeat(draws)


def cholesky(covariance: Tensor) -> Tensor:
    """(B, D, D) symmetric, positive semi-definite -> lower factors, in float64: in float32 singular ones break down."""
    covariance = covariance.double()
    jitter = JITTER * covariance.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(torch.float32).tiny
    eye = torch.eye(covariance.shape[1], dtype=covariance.dtype, device=covariance.device)
    return torch.linalg.cholesky(covariance + jitter[:, None, None] * eye)


def intensity_at(progress: float, intensity: float) -> float:
    """The intensity at `progress` (0 to 1) through the training: lowered in steps, as published."""
    factor = 1.0 if progress <= 0.4 else 0.9 if progress <= 0.6 else 0.75 if progress <= 0.8 else 0.6
    return factor * intensity


class ClassAugmentation(nn.Module):
    """Estimate of each class's variation, its correction by neighbors, and the draws from it.

    Estimated before epoch `start_epoch` (the first is 0) and every `update_every` epochs from there; nothing is drawn
    before. The other arguments are those of ClassVariation, neighbor_correction and synthesize.

    forward(z (B, D) raw, labels (B,), epoch, generator) -> (M*B, D), or None before `start_epoch`.
    """

    corrected: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        epochs: int,
        intensity: float,
        draws: int,
        start_epoch: int,
        update_every: int,
        momentum: float,
        covariance: str,
        neighbors: int,
        beta: float,
        gamma: float,
        tau: float,
    ):
        super().__init__()
        self.variation = ClassVariation(num_classes, dim, momentum, covariance)
        self.register_buffer("corrected", torch.zeros_like(self.variation.variance))
        self.epochs, self.start_epoch, self.update_every = epochs, start_epoch, update_every
        self.intensity, self.draws = intensity, draws
        self.neighbors, self.beta, self.gamma, self.tau = neighbors, beta, gamma, tau

    def due(self, epoch: int) -> bool:
        return epoch >= self.start_epoch and (epoch - self.start_epoch) % self.update_every == 0

    def estimate(self, shard: Iterable[tuple[Tensor, Tensor]]) -> None:
        """shard: (z (b, D) raw, labels (b,)) batches of this rank's part of the training set. Call on every rank."""
        v = self.variation
        v.begin()
        for z, labels in shard:
            v.add(z, labels)
        v.finish()
        self.corrected.copy_(
            neighbor_correction(v.mean, v.variance, v.size, self.neighbors, self.beta, self.gamma, self.tau)
        )

    def forward(self, z: Tensor, labels: Tensor, epoch: int, generator: torch.Generator) -> Tensor | None:
        if epoch < self.start_epoch:
            return None
        intensity = intensity_at(epoch / self.epochs, self.intensity)
        return synthesize(z, labels, self.corrected, intensity, self.draws, generator)[0]
