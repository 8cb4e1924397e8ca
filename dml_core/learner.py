"""The whole of one step: features, embeddings, gather, synthesis, base loss, ranking.

One module with one state dict. Read this file, then pipelines/training/loop.py, and you have seen the whole.
"""

from functools import cached_property, partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from dml_core.backbones import Backbone
from dml_core.gather import broadcast, gather, own_rows, rank, slices_of, tree_sum, world_size
from dml_core.passes import Each, Passes, call, flat
from dml_core.ranking.clusters import ClusterRanking
from dml_core.ranking.intensity import IntensityRanking
from dml_core.synthesis.gaussian import ClassAugmentation

if TYPE_CHECKING:  # its library waits for a training
    from dml_core.base_losses import BaseLoss


class Terms(NamedTuple):
    """The loss of one global batch and the terms it is made of: scalars, before weighting, zero where not in use.

    Attributes:
        loss: The weighted sum.
        base: The base loss; the boosted one where IAA draws synthetics.
        sgar_rank: SGAR's ranking of synthetics by intensity.
        sgar_anchor: SGAR's term that keeps synthetics in their class.
        sgar_open: Not a term, but the share of SGAR's sources whose gate is open.
        namr_rank: NAMR's ranking of distances to clusters.
    """

    loss: Tensor
    base: Tensor
    sgar_rank: Tensor
    sgar_anchor: Tensor
    sgar_open: Tensor
    namr_rank: Tensor


class Weights(NamedTuple):
    """The factors of the terms in the sum."""

    sgar_rank: float = 0.0
    sgar_anchor: float = 0.0
    namr_rank: float = 0.0


class Learner(nn.Module):
    """Backbone, head, base loss and the methods on top; `backward` does the whole step.

    Images are uint8 (b, 3, S, S); where the backbone is frozen and has been run before, features (b, F) take their
    place.

    Args:
        backbone: Images to features.
        head: Features (b, F) to raw embeddings (b, D).
        base_loss: The loss that the methods are added to; None: this learner embeds, and is not trained.
        weights: The factors of the terms.
        iaa: The augmentation of classes, if in use.
        sgar: The ranking of synthetics by intensity, if in use.
        namr: The ranking of distances to clusters, if in use.

    Attributes:
        passes: How images pass through the backbone; see passes.RecordedPasses for a GPU.
        run_loss: How `loss_and_gradient` is called; see passes.RecordedLoss for a GPU.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        base_loss: "BaseLoss | None",
        weights: Weights,
        iaa: ClassAugmentation | None = None,
        sgar: IntensityRanking | None = None,
        namr: ClusterRanking | None = None,
    ):
        super().__init__()
        self.backbone, self.head, self.base_loss, self.weights = backbone, head, base_loss, weights
        self.iaa, self.sgar, self.namr = iaa, sgar, namr
        self.passes, self.run_loss = Passes(backbone), call

    @cached_property
    def trained(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The parameters that are trained: the backbone's, and the others. They are listed once, at the first use."""
        backbone = [p for p in self.backbone.parameters() if p.requires_grad]
        of_backbone = set(backbone)
        return backbone, [p for p in self.parameters() if p.requires_grad and p not in of_backbone]

    def features(self, x: Tensor) -> Tensor:
        """Map uint8 images (b, 3, S, S) to features (b, F); features pass through."""
        if x.ndim == 2:
            return x
        return self.passes.fast(x) if torch.is_grad_enabled() else self.passes.infer(x)

    def embed(self, x: Tensor) -> Tensor:
        """Map images or features to raw embeddings (b, D), float32 or better."""
        return at_least_float32(self.head(self.features(x)))

    def structure(self, x: Tensor) -> Tensor:
        """Map images or features to structure embeddings (b, D) of NAMR, float32 or better."""
        assert self.namr is not None
        return at_least_float32(self.namr.structure(self.features(x)))

    def forward(self, features: Tensor, labels: Tensor, epoch: int, generator: torch.Generator) -> Terms:
        """Compute the loss of a global batch.

        Args:
            features: (B, F) of the global batch.
            labels: (B,) classes.
            epoch: The epoch of the training, from 0.
            generator: Draws the noise of the global batch; in the same state on every rank.

        Returns:
            The terms, the same on every rank.
        """
        assert self.base_loss is not None
        z = at_least_float32(self.head(features))
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
        self, x: Tensor, labels: Tensor, epoch: int, generator: torch.Generator, slices: int = 1, each: Each = map
    ) -> Terms:
        """Add to every .grad the gradient that one process with the whole global batch would add.

        The backbone takes the slices one by one, and their gradients are summed along a tree: neither what a slice
        gives nor the sum depends on how many ranks share the slices. What lies behind the backbone is given the global
        batch on every rank; rank 0's gradient of it is used.

        Args:
            x: Images or features of this rank's slices.
            labels: (b,) their classes.
            epoch: The epoch of the training, from 0.
            generator: As in `forward`.
            slices: S, equal parts of the global batch; no fewer than ranks.
            each: A function like map, which may use several threads.

        Returns:
            The terms of the global batch.
        """
        backbone, others = self.trained
        own = len(slices_of(rank(), world_size(), slices))
        outputs = self.passes.forward(x.chunk(own), each) if x.ndim > 2 else [x]
        features = gather(torch.cat([at_least_float32(output) for output in outputs]), slices)
        loss = partial(self.loss_and_gradient, epoch=epoch, generator=generator)
        draws = None if self.iaa is None else self.iaa.intensity_in(epoch)
        result = self.run_loss((self, generator, draws), loss, features, gather(labels, slices))
        terms, result = Terms(*result[: len(Terms._fields)]), result[len(Terms._fields) :]
        if backbone:
            to_features, result = result[: features.numel()].view_as(features), result[features.numel() :]
            slice_gradients = own_rows(to_features, slices).chunk(own)
            add_gradient(backbone, tree_sum(self.passes.backward(slice_gradients, backbone, each), slices))
        add_gradient(others, broadcast(result, 0))
        return terms

    def loss_and_gradient(self, features: Tensor, labels: Tensor, epoch: int, generator: torch.Generator) -> Tensor:
        """Compute the loss of a global batch and its gradient. Arguments as of `forward`.

        Returns:
            Joined to one dimension: the terms, the gradient of the features if the backbone is trained, and that of
            the parameters behind it.
        """
        backbone, others = self.trained
        features = features.detach().requires_grad_(bool(backbone))
        terms = self(features, labels, epoch, generator)
        inputs = [features, *others] if backbone else others
        gradients = torch.autograd.grad(terms.loss, inputs, materialize_grads=True)
        return flat([torch.stack(terms).detach().to(features.dtype), *gradients])


def add_gradient(parameters: list[nn.Parameter], gradient: Tensor) -> None:
    """Add the parts of a flat gradient to the .grad of the parameters."""
    for p, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p) if p.grad is None else p.grad + part.view_as(p)


def at_least_float32(x: Tensor) -> Tensor:
    """Raise half precision to float32, which losses and searches need; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
