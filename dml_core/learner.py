"""The whole of one step: features, embeddings, gather, synthesis, base loss, ranking.

One module with one state dict. Read this file, then pipelines/train.py, and you have seen the whole.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dml_core.backbones import Backbone
from dml_core.base_losses import BaseLoss
from dml_core.gather import broadcast, gather, own_rows, tree_sum
from dml_core.ranking.clusters import ClusterRanking
from dml_core.ranking.intensity import IntensityRanking
from dml_core.synthesis.gaussian import ClassAugmentation

Each = Callable[..., Iterable[Any]]


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

    forward(features (B, F), labels (B,), epoch, generator) -> Terms of the global batch, the same on every rank.
    epoch: of the training, from 0. generator: in the same state on every rank; noise is drawn for the global batch.
    backward does the whole step. Images: uint8 (b, 3, S, S); where the backbone is frozen and has been run before,
    features (b, F) take their place.
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

    @cached_property
    def trained(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters that are, from the first use on: the backbone's, and the others."""
        backbone = [p for p in self.backbone.parameters() if p.requires_grad]
        before = set(backbone)
        return backbone, [p for p in self.parameters() if p.requires_grad and p not in before]

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

    def forward(self, features: Tensor, labels: Tensor, epoch: int, generator: torch.Generator) -> Terms:
        z = full(self.head(features))
        with torch.autocast(z.device.type, enabled=False):
            synthetic = None if self.iaa is None else self.iaa(z, labels, epoch, generator)
            base = self.base_loss(z, labels, synthetic)
            rank = anchor = gate = clusters = base.new_zeros(())
            if self.sgar is not None:
                rank, anchor, gate = self.sgar(z, labels, self.base_loss.proxies, generator)
            if self.namr is not None:
                clusters = self.namr(z, features)
            w = self.weights
            loss = base + w.sgar_rank * rank + w.sgar_anchor * anchor + w.namr_rank * clusters
            return Terms(loss, base, rank, anchor, gate, clusters)

    def backward(
        self, x: Tensor, labels: Tensor, epoch: int, generator: torch.Generator, parts: int = 1, each: Each = map
    ) -> Terms:
        """Terms of the global batch, and to every .grad the gradient that one process holding all of it would add.

        x: this rank's rows, images or features; labels (b,) theirs. parts: equal slices that the backbone takes one by
        one, and whose gradients are summed as a tree: what a slice gives, and hence the sum, does not depend on how
        many ranks share the slices. each: like map, perhaps in several threads.
        What lies behind the backbone sees the global batch on every rank; rank 0's gradient of it holds.
        """
        backbone, others = self.trained
        seen = list(each(self.features, x.chunk(parts)))
        features = gather(torch.cat([full(part.detach()) for part in seen])).requires_grad_(bool(backbone))
        terms = self(features, gather(labels), epoch, generator)
        wanted = [features, *others] if backbone else others
        gradients = [*torch.autograd.grad(terms.loss, wanted, materialize_grads=True)]
        if backbone:
            own = own_rows(gradients.pop(0)).chunk(parts)

            def through(part: Tensor, gradient: Tensor) -> Tensor:
                return flat(torch.autograd.grad(part, backbone, gradient.to(part.dtype), materialize_grads=True))

            add(backbone, tree_sum(list(each(through, seen, own))))
        add(others, broadcast(flat(gradients), 0))
        return terms


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def add(parameters: list[nn.Parameter], gradient: Tensor) -> None:
    """Add the parts of a flat gradient to the parameters' own."""
    for p, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p) if p.grad is None else p.grad + part.view_as(p)


def full(x: Tensor) -> Tensor:
    """At least float32: what losses and searches are given."""
    return x if x.dtype == torch.float64 else x.float()
