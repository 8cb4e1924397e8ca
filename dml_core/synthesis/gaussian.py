"""Synthetic embeddings drawn from the variation of their class.

Fu et al., "Intra-class Adaptive Augmentation with Neighbor Correction for Deep Metric Learning", IEEE TMM 2022:
  zhat = z + sqrt(lambda V_y) eps,  eps ~ N(0, I).
But:
- Every draw has the same variance. The published code takes one more square root for each draw.
- lambda is inside the root, as in the paper.
- Full covariances are an option of ours.
"""

import torch
from torch import Tensor

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
