"""Features to embeddings."""

from torch import nn


def linear(features: int, dim: int) -> nn.Linear:
    """The sample head: (B, features) to (B, dim) raw embeddings. Losses and searches normalise, the head does not."""
    head = nn.Linear(features, dim)
    nn.init.kaiming_normal_(head.weight, mode="fan_out")
    nn.init.zeros_(head.bias)
    return head
