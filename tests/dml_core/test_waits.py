"""No term of a training makes the host wait for a GPU: what lies behind the backbone can be one CUDA graph."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dml_core import base_losses
from dml_core.learner import Learner, Weights
from dml_core.ranking.clusters import ClusterRanking
from dml_core.ranking.intensity import IntensityRanking
from dml_core.synthesis.gaussian import ClassAugmentation
from tests.waits import forbid_waits

CLASSES, FEATURES, DIM = 40, 24, 16
OWN_LOSSES: dict[str, tuple[str, dict]] = {
    "multi_similarity": ("multi_similarity", {}),
    "multi_similarity, all pairs": ("multi_similarity", {"miner": None}),
    "contrastive": ("contrastive", {}),
    **{
        f"triplet, {kind}": ("triplet", {"miner_arguments": {"type_of_triplets": kind, "margin": 0.1}})
        for kind in ("semihard", "hard", "easy", "all")
    },
    "triplet, no miner": ("TripletMarginLoss", {}),
    "margin": ("margin", {"nu": 0.1}),
    "margin, all triplets": ("margin", {"miner": None}),
    "margin, one beta": ("margin", {"learn_beta": False}),
    "margin, one learned beta": ("margin", {"nu": 0.1, "beta_per_class": False}),
    "proxy_anchor": ("proxy_anchor", {}),
    "proxy_anchor, regularized": (
        "proxy_anchor",
        {"embedding_regularizer": "LpRegularizer", "weight_regularizer": "RegularFaceRegularizer"},
    ),
}


class Term(NamedTuple):
    """Something that is trained, and what it is called with."""

    module: nn.Module
    step: Callable[..., Tensor]
    inputs: tuple


def whole_step(loss: str, batch: int = 32, covariance: str = "diag", spacing: str = "even") -> Term:
    """Head, base loss and all methods, at an epoch in which synthetics are drawn."""
    torch.manual_seed(0)
    name, arguments = OWN_LOSSES.get(loss, (loss, {}))
    learner = Learner(
        nn.Identity(),
        nn.Linear(FEATURES, DIM),
        base_losses.build(name, CLASSES, DIM, **arguments),
        Weights(0.2, 0.2, 0.2),
        ClassAugmentation(CLASSES, DIM, 10, 0.7, 3, 0, 1, 0.2, covariance, 5, 0.1, 0.1, 40),
        IntensityRanking(DIM, 0.3, 4, 0.11, 0.2, 32.0, 0.05, 32.0, 0.1, False),
        ClusterRanking(nn.Sequential(nn.Linear(FEATURES, DIM), nn.Softplus()), 3, 3.0, 10.0, spacing),
    )
    variance = torch.rand(CLASSES, DIM)
    learner.iaa.corrected.copy_(variance if covariance == "diag" else variance.diag_embed())
    features = torch.randn(CLASSES, FEATURES).repeat_interleave(4, 0)[:batch] + torch.randn(batch, FEATURES)
    labels = torch.arange(batch) // 4
    return Term(learner, partial(loss_of, learner), (features.requires_grad_(), labels, 3))


def loss_of(learner: Learner, features: Tensor, labels: Tensor, epoch: int, generator: torch.Generator) -> Tensor:
    return learner(features, labels, epoch, generator).loss


@pytest.mark.parametrize("loss", OWN_LOSSES)
def test_a_step_never_waits(loss):
    module, step, inputs = whole_step(loss)
    forbid_waits(step, module, [*inputs, torch.Generator()])


@pytest.mark.parametrize(("covariance", "spacing"), [("full", "even"), ("diag", "quantile")])
def test_nor_do_other_ways_of_the_methods(covariance, spacing):
    module, step, inputs = whole_step("multi_similarity", 32, covariance, spacing)
    forbid_waits(step, module, [*inputs, torch.Generator()])


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x * float(x.detach().sum()),
        lambda x: x[x > 0],
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x[torch.where(x > 0)[0]],
        lambda x: x.cpu(),
        lambda x: x.unique(),
    ],
)
def test_a_wait_is_found(wait):
    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return wait(x).sum()

    module = Waits()
    with pytest.raises((NotImplementedError, RuntimeError), match=r"meta|Meta"):
        forbid_waits(module, module, [torch.randn(4, requires_grad=True)])


class WaitsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.expand(4) if gradient > 0 else None


def test_a_wait_in_the_backward_is_found():
    with pytest.raises(RuntimeError, match="meta"):
        forbid_waits(WaitsInBackward.apply, nn.Identity(), [torch.randn(4, requires_grad=True)])
