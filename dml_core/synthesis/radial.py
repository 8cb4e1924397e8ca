"""Synthetic embeddings of rising intensity around each sample.

Liu et al., "Self-supervised Generative Assisted Ranking" (SGAR), Eng. Appl. of AI 131 (2024) 107885, arXiv 2304.10941.
But:
- The step is a multiple of the embedding's norm, so that an intensity means the same at every scale of z.
- Directions are normalised once, before they are scaled. The published code normalises again after scaling, which
  gives every synthetic the same distance from its source and erases the intensities.
"""

import torch
from torch import Tensor


def draw_offsets(z: Tensor, intensity: float, count: int, generator: torch.Generator, shared: bool = False) -> Tensor:
    """Draw the offsets j r u_j, j = 1..N, of synthetics from unit embeddings; u_j is uniform on the unit sphere.

    Args:
        z: (B, D) embeddings, for their shape, type and device.
        intensity: r.
        count: N.
        generator: Draws the directions.
        shared: Whether all sources share the directions, as published.

    Returns:
        (N, B, D), or (N, 1, D) if shared; weakest first.
    """
    shape = (count, 1 if shared else len(z), z.shape[1])
    directions = torch.randn(shape, generator=generator, device=z.device, dtype=z.dtype)
    steps = intensity * torch.arange(1, count + 1, device=z.device, dtype=z.dtype)[:, None, None]
    return directions.mul_(steps / directions.norm(dim=2, keepdim=True))


def synthesize(z: Tensor, intensity: float, count: int, generator: torch.Generator, shared: bool = False) -> Tensor:
    """Draw synthetics r_j = z + j r ||z|| u_j, j = 1..N, of rising intensity. Gradients flow through z.

    Args:
        z: (B, D) embeddings.
        intensity: r.
        count: N.
        generator: Draws the directions u_j.
        shared: Whether all sources share the directions, as published.

    Returns:
        (N, B, D), weakest first.
    """
    return z + z.norm(dim=1, keepdim=True) * draw_offsets(z, intensity, count, generator, shared)
