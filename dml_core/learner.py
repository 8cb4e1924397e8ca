"""The whole of one step: features, embeddings, gather, synthesis, base loss, ranking.

One module with one state dict. Read this file, then pipelines/train.py, and you have seen the whole.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dml_core.backbones import Backbone
from dml_core.base_losses import BaseLoss
from dml_core.gather import gather
from dml_core.ranking.clusters import ClusterRanking
from dml_core.ranking.intensity import IntensityRanking
from dml_core.synthesis.gaussian import ClassAugmentation


class Terms(NamedTuple):
    """The loss of one global batch and what it is made of, each a scalar before weighting; zero where not in use.

    base is the boosted loss where IAA draws synthetics. sgar_open, no term: the share of sources whose gate is open.
    """

    loss: Tensor
    base: Tensor
    sgar_rank: Tensor
    sgar_anchor: Tensor
    sgar_open: Tensor
    namr_rank: Tensor


class Weights(NamedTuple):
    """What a term is multiplied by in the sum."""

    sgar_rank: float = 0.0
    sgar_anchor: float = 0.0
    namr_rank: float = 0.0


class Learner(nn.Module):
    """Backbone, head, base loss and the methods on top.

    forward(x, labels (b,), epoch, generator) -> Terms of the global batch, the same on every rank. x: this rank's rows
    of it, uint8 images (b, 3, S, S), or their features (b, F) where the backbone is frozen and has been run before.
    epoch: of the training, from 0. generator: in the same state on every rank; noise is drawn for the global batch.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        base_loss: BaseLoss,
        weights: Weights,
        iaa: ClassAugmentation | None = None,
        sgar: IntensityRanking | None = None,
        namr: ClusterRanking | None = None,
    ):
        super().__init__()
        self.backbone, self.head, self.base_loss, self.weights = backbone, head, base_loss, weights
        self.iaa, self.sgar, self.namr = iaa, sgar, namr

    def features(self, x: Tensor) -> Tensor:
        """uint8 images (b, 3, S, S) to features (b, F); features pass through."""
        return x if x.ndim == 2 else self.backbone(x)

    def embed(self, x: Tensor) -> Tensor:
        """Images or features to raw embeddings (b, D), float32 or better."""
        return full(self.head(self.features(x)))

    def structure(self, x: Tensor) -> Tensor:
        """Images or features to structure embeddings (b, D) of NAMR, float32 or better."""
        assert self.namr is not None
        return full(self.namr.structure(self.features(x)))

    def forward(self, x: Tensor, labels: Tensor, epoch: int, generator: torch.Generator) -> Terms:
        features = self.features(x)
        z, labels = gather(self.embed(features)), gather(labels)
        with torch.autocast(z.device.type, enabled=False):
            synthetic = None if self.iaa is None else self.iaa(z, labels, epoch, generator)
            base = self.base_loss(z, labels, synthetic)
            rank = anchor = gate = clusters = base.new_zeros(())
            if self.sgar is not None:
                rank, anchor, gate = self.sgar(z, labels, self.base_loss.proxies, generator)
            if self.namr is not None:
                clusters = self.namr(z, gather(full(features)))
            w = self.weights
            loss = base + w.sgar_rank * rank + w.sgar_anchor * anchor + w.namr_rank * clusters
            return Terms(loss, base, rank, anchor, gate, clusters)


def full(x: Tensor) -> Tensor:
    """At least float32: what losses and searches are given."""
    return x if x.dtype == torch.float64 else x.float()
