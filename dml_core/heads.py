"""Heads: modules that map features to embeddings."""

import torch
from torch import Tensor, nn


def linear(features: int, dim: int) -> nn.Module:
    """Build the sample head, which maps features to raw embeddings. Losses and searches normalise, the head does not.

    Features are brought to unit root mean square first, sample by sample: pooled features differ by orders of magnitude
    between networks, and one learning rate should do for all of them. The matrix begins orthogonal, so that an
    untrained head keeps as much of the features' geometry as `dim` allows.

    Args:
        features: F, the width of the features.
        dim: D, the numbers in an embedding.

    Returns:
        A module (B, F) -> (B, D).
    """
    matrix = nn.Linear(features, dim, bias=False)
    nn.init.orthogonal_(matrix.weight)
    return nn.Sequential(nn.RMSNorm(features, elementwise_affine=False), matrix)


class Structure(nn.Sequential):
    """The structure head of NASA (Li et al., AAAI 2022): features (B, F) to weights (B, D) of the dimensions.

    s = 1 + 0.5 (2 sigma - 1), in [0.5, 1.5]. While training its statistics are those of the batch that it is given:
    give it the global one. Features are brought to unit root mean square first, as the sample head's are.

    Args:
        features: F, the width of the features.
        dim: D, the numbers in an embedding.
    """

    def __init__(self, features: int, dim: int):
        super().__init__(
            nn.RMSNorm(features, elementwise_affine=False),
            nn.Linear(features, dim, bias=False),
            nn.BatchNorm1d(dim),
            nn.Linear(dim, dim, bias=False),
            nn.BatchNorm1d(dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 + torch.sigmoid(super().forward(x))
