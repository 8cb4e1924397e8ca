"""The loss terms on a GPU: no wait for the device, and the processor's numbers."""

import pytest
import torch
from torch import Tensor

from dml_core import base_losses
from tests.dml_core.test_waits import CLASSES, DIM, OWN_LOSSES, whole_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DRAWN = {
    "margin",
    "margin, one beta",
    "margin, one learned beta",
}  # whose triplets are drawn by each device's own generator
OTHER_WAYS = [("multi_similarity", "full", "even"), ("multi_similarity", "diag", "quantile")]


def run(device: str, loss: str, covariance: str = "diag", spacing: str = "even", forbid_waits: bool = False) -> Tensor:
    """Loss and gradients of a step with all methods, B = 128, on the CPU."""
    module, step, (features, labels, epoch) = whole_step(loss, 128, covariance, spacing)
    module.to(device)
    generator = torch.Generator(device).manual_seed(0)
    given = features.detach().to(device).requires_grad_(), labels.to(device), epoch, generator
    wanted = [given[0], *(p for p in module.parameters() if p.requires_grad)]
    step(*given)  # the first call loads kernels
    generator.manual_seed(0)
    if forbid_waits:
        torch.cuda.set_sync_debug_mode("error")
    try:
        value = step(*given)
        gradients = torch.autograd.grad(value, wanted, materialize_grads=True)
    finally:
        if forbid_waits:
            torch.cuda.set_sync_debug_mode("default")
    return torch.cat([x.flatten() for x in (value, *gradients)]).cpu()


@pytest.mark.parametrize("loss", OWN_LOSSES)
def test_a_step_never_waits(loss):
    assert run("cuda", loss, forbid_waits=True).isfinite().all()


@pytest.mark.parametrize(("loss", "covariance", "spacing"), OTHER_WAYS)
def test_nor_do_other_ways_of_the_methods(loss, covariance, spacing):
    assert run("cuda", loss, covariance, spacing, forbid_waits=True).isfinite().all()


def check_values(device: str, loss: str) -> None:
    """In float32, beside the processor's float64: value, and gradients of embeddings and synthetics."""
    name, arguments = OWN_LOSSES[loss]
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(128) // 4
    z = torch.randn(CLASSES, DIM, generator=generator)[labels] + torch.randn(128, DIM, generator=generator)
    synthetic = z.repeat(3, 1) + torch.randn(3 * 128, DIM, generator=generator)
    both = []
    for where, dtype in (("cpu", torch.float64), (device, torch.float32)):
        torch.manual_seed(0)
        module = base_losses.build(name, CLASSES, DIM, **arguments).to(where, dtype)
        given = [x.to(where, dtype).requires_grad_() for x in (z, synthetic)]
        value = module(given[0], labels.to(where), given[1])
        value.backward()
        both.append([x.detach().cpu().double() for x in (value, given[0].grad, given[1].grad)])
    # Rounding takes a few triplets across an end of the range of those that count.
    tolerance = 2e-3 if "triplet, " in loss else 1e-5
    for expected, ours in zip(*both, strict=True):
        assert (ours - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("loss", [loss for loss in OWN_LOSSES if loss not in DRAWN])
def test_values_are_the_processors(loss):
    check_values("cuda", loss)


@pytest.mark.parametrize("loss", OWN_LOSSES)
def test_the_same_bits_again(loss):
    """Of draws from the GPU's own generator, too."""
    values = []
    for _ in range(2):
        torch.manual_seed(0)
        values.append(run("cuda", loss))
    assert torch.equal(*values)
