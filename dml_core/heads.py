"""Features to embeddings."""

from torch import nn


def linear(features: int, dim: int) -> nn.Module:
    """The sample head: (B, features) to (B, dim) raw embeddings. Losses and searches normalise, the head does not.

    Features are brought to unit root mean square first, sample by sample: pooled features differ by orders of magnitude
    between networks, and one learning rate should do for all of them. The matrix begins orthogonal, so that an
    untrained head keeps as much of the features' geometry as `dim` allows.
    """
    matrix = nn.Linear(features, dim, bias=False)
    nn.init.orthogonal_(matrix.weight)
    return nn.Sequential(nn.RMSNorm(features, elementwise_affine=False), matrix)
