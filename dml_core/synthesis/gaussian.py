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
    """Draw synthetic embeddings around each sample from the variation of its class. Gradients flow through z.

    Args:
        z: (B, D) raw embeddings.
        labels: (B,) classes.
        variance: (C, D), or (C, D, D), which takes a memory of B D^2 numbers.
        intensity: lambda.
        draws: M, how many synthetics a sample gets.
        generator: Draws the noise.

    Returns:
        The synthetics, (M*B, D), row m*B + i a copy of sample i, and their labels, (M*B,).
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
    """Return the lower factors (B, D, D) of covariances (B, D, D), in float64: in float32 singular ones break down.

    Whether one broke down is not asked, as that would wait for the device.
    """
    covariance = covariance.double()
    jitter = JITTER * covariance.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(torch.float32).tiny
    eye = torch.eye(covariance.shape[1], dtype=covariance.dtype, device=covariance.device)
    return torch.linalg.cholesky_ex(covariance + jitter[:, None, None] * eye).L


def intensity_at(progress: float, intensity: float) -> float:
    """Return the intensity at `progress` (0 to 1) through the training. It is lowered in steps, as published."""
    factor = 1.0 if progress <= 0.4 else 0.9 if progress <= 0.6 else 0.75 if progress <= 0.8 else 0.6
    return factor * intensity


class ClassAugmentation(nn.Module):
    """IAA: the variation of each class is estimated, corrected by neighbors, and synthetics are drawn from it.

    Args:
        num_classes: C.
        dim: D.
        epochs: Length of the training, over which the intensity is lowered.
        intensity: As in `synthesize`.
        draws: As in `synthesize`.
        start: Share of the epochs, rounded down to whole ones, before the first estimate; nothing is drawn in them.
        update_every: It is estimated anew after so many epochs.
        momentum: As in ClassVariation.
        covariance: As in ClassVariation.
        neighbors: As in `neighbor_correction`.
        beta: As in `neighbor_correction`.
        gamma: As in `neighbor_correction`.
        tau: As in `neighbor_correction`.
    """

    corrected: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        epochs: int,
        intensity: float,
        draws: int,
        start: float,
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
        self.epochs, self.update_every = epochs, update_every
        self.start_epoch = int(start * epochs + 1e-9)  # k of n epochs, as the share k / n, are k
        self.intensity, self.draws = intensity, draws
        self.neighbors, self.beta, self.gamma, self.tau = neighbors, beta, gamma, tau

    def due(self, epoch: int) -> bool:
        """Return whether `estimate` is to be called before this epoch."""
        return epoch >= self.start_epoch and (epoch - self.start_epoch) % self.update_every == 0

    def estimate(self, shard: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Estimate the variation of the classes over the training set. Call it on every rank.

        Args:
            shard: Batches of this rank's part of the set: raw embeddings (b, D) and labels (b,).
        """
        v = self.variation
        v.begin()
        for z, labels in shard:
            v.add(z, labels)
        v.finish()
        self.corrected.copy_(
            neighbor_correction(v.mean, v.variance, v.size, self.neighbors, self.beta, self.gamma, self.tau)
        )

    def intensity_in(self, epoch: int) -> float | None:
        """Return the intensity of an epoch's synthetics; None before `start_epoch`, when nothing is drawn."""
        return None if epoch < self.start_epoch else intensity_at(epoch / self.epochs, self.intensity)

    def forward(self, z: Tensor, labels: Tensor, epoch: int, generator: torch.Generator) -> Tensor | None:
        """Draw the synthetics (M*B, D) of z (B, D), labels (B,); None before `start_epoch`."""
        intensity = self.intensity_in(epoch)
        if intensity is None:
            return None
        return synthesize(z, labels, self.corrected, intensity, self.draws, generator)[0]
