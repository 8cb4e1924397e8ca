import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from dml_core.synthesis.gaussian import ClassAugmentation, intensity_at, synthesize
from dml_core.variation import ClassVariation, neighbor_correction

CLASSES, DIM = 4, 3


def inputs(dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6, DIM, generator=generator, dtype=dtype).requires_grad_()
    return z, torch.tensor([0, 0, 1, 1, 3, 3]), torch.rand(CLASSES, DIM, generator=generator, dtype=dtype)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_equals_the_loop():
    z, labels, variance = inputs()
    ours, copies = synthesize(z, labels, variance, 0.7, 3, seeded())
    noise = torch.randn(3, 6, DIM, generator=seeded(), dtype=z.dtype)
    for m in range(3):
        for i in range(6):
            expected = z[i] + (0.7 * variance[labels[i]]).sqrt() * noise[m, i]
            torch.testing.assert_close(ours[m * 6 + i], expected)
            assert copies[m * 6 + i] == labels[i]


@pytest.mark.parametrize("full", [False, True])
def test_moments(full):
    z = torch.tensor([[1.0, -2.0, 3.0]])
    root = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.3, 0.0], [-1.0, 0.2, 0.7]])
    covariance = root @ root.T if full else torch.tensor([1.0, 0.25, 4.0]).diag()
    variance = covariance if full else covariance.diagonal()
    drawn, _ = synthesize(z, torch.tensor([0]), variance[None], 0.5, 40_000, seeded())
    torch.testing.assert_close(drawn.mean(0), z[0], atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.T.cov(), 0.5 * covariance, atol=0.05, rtol=0)


@pytest.mark.parametrize("full", [False, True])
def test_gradient_flows_through_z_alone(full):
    z, labels, variance = inputs()
    variance = (variance.diag_embed() if full else variance).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: synthesize(z, labels, variance, 0.7, 2, seeded())[0], (z,))
    synthesize(z, labels, variance, 0.7, 2, seeded())[0].sum().backward()
    assert variance.grad is None and torch.equal(z.grad, torch.full_like(z, 2))


@pytest.mark.parametrize("full", [False, True])
def test_intensity_zero_gives_copies(full):
    z, labels, variance = inputs()
    drawn, _ = synthesize(z, labels, variance.diag_embed() if full else variance, 0.0, 2, seeded())
    assert torch.equal(drawn, z.repeat(2, 1))


def test_noise_is_fresh_for_each_draw_and_follows_the_generator():
    z, labels, variance = inputs()
    generator = seeded()
    first, second = (synthesize(z, labels, variance, 1.0, 2, generator)[0] for _ in range(2))
    assert not torch.equal(first, second) and not torch.equal(first[:6], first[6:])
    assert torch.equal(first, synthesize(z, labels, variance, 1.0, 2, seeded())[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_covariances(dtype):
    """Fewer samples than dimensions, identical samples, and no variation at all."""
    x = torch.randn(2, 64, generator=seeded(), dtype=dtype)
    covariance = torch.stack([x.T @ x / 2, torch.zeros(64, 64, dtype=dtype)])
    z = torch.zeros(2, 64, dtype=dtype)
    drawn, _ = synthesize(z, torch.tensor([0, 1]), covariance, 1.0, 3, seeded())
    assert drawn.isfinite().all() and drawn.dtype == dtype
    assert drawn[0::2].norm() > 1 and drawn[1::2].norm() < 1e-6


def test_low_precision_is_computed_in_float32():
    z, labels, variance = inputs(torch.float32)
    low = z.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        drawn, _ = synthesize(low, labels, variance.diag_embed(), 0.7, 2, seeded())
    assert torch.equal(drawn, synthesize(low.float(), labels, variance.diag_embed(), 0.7, 2, seeded())[0])


def test_intensity_falls_in_steps():
    steps = {0: 1, 0.4: 1, 0.41: 0.9, 0.6: 0.9, 0.61: 0.75, 0.8: 0.75, 0.81: 0.6, 1: 0.6}
    for progress, factor in steps.items():
        assert intensity_at(progress, 0.7) == pytest.approx(0.7 * factor)


def augmentation(**changes) -> ClassAugmentation:
    settings = {
        "epochs": 10,
        "intensity": 0.7,
        "draws": 2,
        "start": 0.2,
        "update_every": 3,
        "momentum": 0.2,
        "covariance": "diag",
        "neighbors": 2,
        "beta": 0.1,
        "gamma": 0.1,
        "tau": 40.0,
    }
    return ClassAugmentation(CLASSES, DIM, **(settings | changes)).double()


def test_estimates_come_from_the_start_on_at_their_interval():
    assert [epoch for epoch in range(10) if augmentation().due(epoch)] == [2, 5, 8]
    assert [epoch for epoch in range(4) if augmentation(start=0.0, update_every=1).due(epoch)] == [0, 1, 2, 3]


@given(st.integers(1, 300).flatmap(lambda epochs: st.tuples(st.integers(0, epochs - 1), st.just(epochs))))
def test_start_is_a_share_of_the_epochs_rounded_down(first_of):
    first, epochs = first_of
    assert augmentation(epochs=epochs, start=first / epochs).start_epoch == first
    assert augmentation(epochs=epochs, start=(first + 0.99) / epochs).start_epoch == first


def test_draws_from_the_corrected_variation_of_the_whole_set():
    z, labels, _ = inputs()
    z = z.detach()
    module = augmentation()
    assert module(z, labels, 1, seeded()) is None
    module.estimate([(z[:4], labels[:4]), (z[4:], labels[4:])])
    whole = ClassVariation(CLASSES, DIM).double()
    whole.update(z, labels)
    corrected = neighbor_correction(whole.mean, whole.variance, whole.count, 2)
    torch.testing.assert_close(module.corrected, corrected)
    assert not torch.allclose(corrected, whole.variance)
    for epoch, factor in ((2, 1.0), (5, 0.9), (9, 0.6)):
        expected, _ = synthesize(z, labels, corrected, 0.7 * factor, 2, seeded())
        torch.testing.assert_close(module(z, labels, epoch, seeded()), expected)


def test_state_dict_holds_all_that_is_drawn_from():
    z, labels, _ = inputs()
    one, other = augmentation(), augmentation()
    one.estimate([(z.detach(), labels)])
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(z, labels, 3, seeded()), other(z, labels, 3, seeded()))
    for module in (one, other):
        module.estimate([(2 * z.detach(), labels)])
    assert torch.equal(one.corrected, other.corrected)
