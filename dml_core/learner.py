"""The whole of one step: features, embeddings, gather, synthesis, base loss, ranking.

One module with one state dict. Read this file, then pipelines/train.py, and you have seen the whole.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dml_core.backbones import Backbone
from dml_core.base_losses import BaseLoss
from dml_core.gather import gather
from dml_core.ranking.intensity import IntensityRanking


class Terms(NamedTuple):
    """The loss of one global batch and what it is made of, each a scalar before weighting; zero where not in use."""

    loss: Tensor
    base: Tensor
    sgar_rank: Tensor
    sgar_anchor: Tensor


class Weights(NamedTuple):
    """What a term is multiplied by in the sum."""

    sgar_rank: float = 0.0
    sgar_anchor: float = 0.0


class Learner(nn.Module):
    """Backbone, head, base loss and the methods on top.

    forward(x, labels (b,), generator) -> Terms of the global batch, the same on every rank. x: this rank's rows of it,
    uint8 images (b, 3, S, S), or their features (b, F) where the backbone is frozen and has been run before.
    generator: in the same state on every rank; noise is drawn for the global batch.
    """

    def __init__(
        self, backbone: Backbone, head: nn.Module, base_loss: BaseLoss, weights: Weights, sgar: IntensityRanking | None
    ):
        super().__init__()
        self.backbone, self.head, self.base_loss, self.weights, self.sgar = backbone, head, base_loss, weights, sgar

    def features(self, x: Tensor) -> Tensor:
        """uint8 images (b, 3, S, S) to features (b, F); features pass through."""
        return x if x.ndim == 2 else self.backbone(x)

    def embed(self, x: Tensor) -> Tensor:
        """Images or features to raw embeddings (b, D), float32 or better."""
        z = self.head(self.features(x))
        return z if z.dtype == torch.float64 else z.float()

    def forward(self, x: Tensor, labels: Tensor, generator: torch.Generator) -> Terms:
        z, labels = gather(self.embed(x)), gather(labels)
        with torch.autocast(z.device.type, enabled=False):
            base = self.base_loss(z, labels)
            rank = anchor = base.new_zeros(())
            if self.sgar is not None:
                rank, anchor = self.sgar(z, labels, self.base_loss.proxies, generator)
            loss = base + self.weights.sgar_rank * rank + self.weights.sgar_anchor * anchor
            return Terms(loss, base, rank, anchor)
