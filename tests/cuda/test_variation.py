"""The class variation on a GPU, whose float sums are in another order each time."""

import pytest
import torch

from dml_core.variation import ClassVariation

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CLASSES, DIM, SAMPLES = 50, 64, 20_000


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_same_bits_in_any_order_and_batches_and_near_the_cpu(covariance):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(SAMPLES, DIM, generator=generator)
    z[-1] *= 1e6
    labels = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
    cpu = ClassVariation(CLASSES, DIM, covariance=covariance).double()
    gpu, dealt = (ClassVariation(CLASSES, DIM, covariance=covariance).double().cuda() for _ in range(2))
    for _ in range(2):
        cpu.update(z, labels)
        gpu.update(z.cuda(), labels.cuda())
        dealt.begin()
        for rows in torch.randperm(SAMPLES, generator=generator).split(999):
            dealt.add(z[rows].cuda(), labels[rows].cuda())
        dealt.finish()
    for key, value in gpu.state_dict().items():
        assert torch.equal(dealt.state_dict()[key], value), key
        torch.testing.assert_close(value.cpu(), cpu.state_dict()[key], rtol=1e-6, atol=1e-6)
