import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dml_core import heads
from dml_core.ranking.clusters import (
    ClusterRanking,
    DistanceToCenters,
    adaptive_distance,
    cluster_centers,
    cluster_ranking_loss,
    plain_distance,
)

SHARED = Path(os.environ.get("DML_SHARED", Path(__file__).parents[4] / "shared"))


@pytest.fixture(scope="module")
def golden():
    return np.load(SHARED / "golden" / "published_code.npz")


def inputs(samples: int = 9, dim: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(samples, dim, generator=generator, dtype=dtype)
    return z.requires_grad_(), (0.5 + torch.rand(samples, dim, generator=generator, dtype=dtype)).requires_grad_()


def naive_loss(z: list, s: list, centers: int, t: float, alpha: float, spacing: str) -> float:
    size = len(z)

    def distance(i, j, weights):
        return math.sqrt(sum(w * (a - b) ** 2 for w, a, b in zip(weights, z[i], z[j], strict=True)))

    plain = [distance(i, j, [1] * len(z[0])) for i in range(size) for j in range(size)]
    if spacing == "even":
        mean, std = np.mean(plain), np.std(plain, ddof=1)
        last = max(0.2 * mean, mean - t * std)
        eta = [mean + (last - mean) * m / (centers - 1) for m in range(centers)]
    else:
        pairs = sorted(d for n, d in enumerate(plain) if n % (size + 1))
        eta = [pairs[int((centers - m - 0.5) / centers * len(pairs))] for m in range(centers)]
    assert eta == sorted(eta, reverse=True)
    total = 0.0
    for i in range(size):
        for j in range(size):
            if i != j:
                gaps = [abs(distance(i, j, s[i]) - e) for e in eta]
                weights = [math.exp(-alpha * gap) for gap in gaps]
                total += sum(w * gap for w, gap in zip(weights, gaps, strict=True)) / sum(weights)
    return total / (size * (size - 1))


@pytest.mark.parametrize("spacing", ["even", "quantile"])
@pytest.mark.parametrize("centers", [2, 3, 8])
def test_loss_equals_the_loop(centers, spacing):
    z, s = inputs()
    ours = cluster_ranking_loss(z, s, centers, 1.5, 4.0, spacing)
    assert ours.item() == pytest.approx(naive_loss(z.tolist(), s.tolist(), centers, 1.5, 4.0, spacing), rel=1e-9)


def test_golden(golden):
    z, s = (torch.from_numpy(golden[key]).requires_grad_() for key in ("nasa_z", "nasa_s"))
    loss = cluster_ranking_loss(z, s, 2, float(golden["nasa_t"]), float(golden["nasa_alpha"]))
    loss.backward()
    assert loss.item() == pytest.approx(golden["nasa_loss"], rel=1e-5)
    for got, key in ((z.grad, "nasa_grad_z"), (s.grad, "nasa_grad_s")):
        published = torch.from_numpy(golden[key])
        assert (got - published).norm() <= 1e-5 * published.norm()


def test_distance_is_that_of_the_differences():
    z, s = inputs()
    expected = (s[:, None] * (z[:, None] - z).square()).sum(2)
    distance = adaptive_distance(z, s)
    torch.testing.assert_close(distance.square(), expected)
    assert not distance.diagonal().any() and not torch.allclose(distance, distance.T)


def test_distance_is_exact_far_from_the_origin():
    z, s = inputs(dtype=torch.float32)
    torch.testing.assert_close(adaptive_distance(z + 1000, s), adaptive_distance(z, s), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spacing", ["even", "quantile"])
def test_gradcheck(spacing):
    """Through the distances: the centres are detached, so they are held fixed by evaluating around the same z."""
    z, s = inputs(5)
    assert torch.autograd.gradcheck(adaptive_distance, (z, s))
    assert torch.autograd.gradcheck(lambda s: cluster_ranking_loss(z.detach(), s, 3, spacing=spacing), (s,))


@pytest.mark.parametrize("scale", [1, 100])
def test_gradient_of_the_pull_to_centers(scale):
    """At scale 100 the far centres' shares are below the least float."""
    distance = scale * torch.rand(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    eta = scale * torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    distance.requires_grad_()

    def plain(distance: Tensor) -> Tensor:
        gap = (distance - eta[:, None, None]).abs()
        return (torch.softmax(-10 * gap, 0) * gap).sum(0)[~torch.eye(4, dtype=torch.bool)].mean()

    found = DistanceToCenters.apply(distance, eta, 10.0)
    torch.testing.assert_close(found, plain(distance))
    torch.testing.assert_close(*(torch.autograd.grad(loss, distance) for loss in (found, plain(distance))))
    assert torch.autograd.gradcheck(lambda d: DistanceToCenters.apply(d, eta, 10.0), distance)


@pytest.mark.parametrize("spacing", ["even", "quantile"])
def test_order_of_the_batch_does_not_matter(spacing):
    z, s = inputs()
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(1))
    shuffled = cluster_ranking_loss(z[order], s[order], 3, spacing=spacing)
    torch.testing.assert_close(shuffled, cluster_ranking_loss(z, s, 3, spacing=spacing))


@pytest.mark.parametrize("spacing", ["even", "quantile"])
@pytest.mark.parametrize("samples", [1, 2, 6])
def test_identical_embeddings_have_finite_gradients(samples, spacing):
    z = torch.full((samples, 4), 0.3, requires_grad=True)
    s = inputs(samples, 4, torch.float32)[1]
    loss = cluster_ranking_loss(z, s, 3, spacing=spacing)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all() and s.grad.isfinite().all()


def test_some_identical_embeddings_have_finite_gradients():
    z, s = inputs(dtype=torch.float32)
    same = torch.cat([z, z[:3]])
    cluster_ranking_loss(same, torch.cat([s, s[:3]])).backward()
    assert z.grad.isfinite().all() and z.grad.any() and adaptive_distance(same, same.exp())[0, len(z)] == 0


def test_low_precision_is_computed_in_float32():
    z, s = (x.detach().bfloat16().requires_grad_() for x in inputs(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        loss = cluster_ranking_loss(z, s, 3)
    loss.backward()
    assert loss.dtype == torch.float32 and z.grad.dtype == torch.bfloat16
    assert torch.equal(loss, cluster_ranking_loss(z.float(), s.float(), 3))


def test_unknown_spacing_is_refused():
    with pytest.raises(ValueError, match="spacing must be one of even, quantile, not 'evn'"):
        cluster_ranking_loss(*inputs(), spacing="evn")


def ranking(features: int = 5, dim: int = 4) -> ClusterRanking:
    torch.manual_seed(0)
    return ClusterRanking(heads.Structure(features, dim), 3, 3.0, 10.0, "even").double()


def test_module_ranks_embeddings_at_unit_mean_distance():
    module, (z, _) = ranking(), inputs()
    features = torch.randn(9, 5, dtype=torch.float64)
    loss = module(z, features)
    mean = torch.cdist(z, z).sum() / (9 * 8)
    s = module.structure(features)
    assert 0.5 < s.min() < 0.9 and 1.1 < s.max() < 1.5
    torch.testing.assert_close(loss, cluster_ranking_loss(z / mean, s, 3))
    torch.testing.assert_close(module(7 * z, features), loss)
    (gradient,) = torch.autograd.grad(loss, z)
    assert (gradient * z).sum().abs() < 1e-10 * gradient.norm() * z.norm()  # no scale is better than another


def test_module_gradient():
    module, (z, _) = ranking(), inputs(5)
    features = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)

    def with_fixed_centers(z: Tensor) -> Tensor:
        """As the module, with the centres of the original z."""
        unit = z / (plain_distance(z).sum() / 20)
        eta = cluster_centers(plain_distance(unit).detach(), 3, 3.0, "even")
        gap = (adaptive_distance(unit, module.structure(features)) - eta[:, None, None]).abs()
        return (torch.softmax(-10 * gap, 0) * gap).sum(0).fill_diagonal_(0).sum() / 20

    ours, theirs = (torch.autograd.grad(f, (z, features)) for f in (module(z, features), with_fixed_centers(z)))
    torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(lambda f: module(z.detach(), f), (features,))


@pytest.mark.parametrize("z", [torch.ones(4, 4), torch.zeros(4, 4)], ids=["identical", "zero"])
def test_module_is_finite_for_degenerate_embeddings(z):
    z = z.double().requires_grad_()
    loss = ranking()(z, torch.randn(4, 5, dtype=torch.float64))
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


def test_structure_head_as_a_loop():
    module = heads.Structure(3, 2).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    first, second = (layer.weight for layer in module if isinstance(layer, torch.nn.Linear))
    x_unit = x / (x.square().mean(1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()

    def batch_norm(h: Tensor) -> Tensor:
        return (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()

    logits = batch_norm(batch_norm(x_unit @ first.T) @ second.T)
    torch.testing.assert_close(module(x), 1 + 0.5 * (2 / (1 + (-logits).exp()) - 1))
