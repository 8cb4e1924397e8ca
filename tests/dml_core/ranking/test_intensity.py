import math

import pytest
import torch
from torch.nn.functional import normalize

from dml_core.ranking.intensity import IntensityRanking, class_shares, intensity_ranking_loss
from dml_core.synthesis.radial import synthesize

SETTINGS = {
    "intensity": 0.2,
    "count": 4,
    "margin": 0.11,
    "max_gap": 0.3,
    "scale": 32.0,
    "gate": 0.05,
    "anchor_scale": 32.0,
    "anchor_margin": 0.1,
    "shared_directions": False,
}


def naive_ranking(similarity: list[list[float]], margin: float, scale: float, max_gap: float | None) -> float:
    """The formula of the paper, source by source and pair by pair."""
    total, count, sources = 0.0, len(similarity), len(similarity[0])
    for s in range(sources):
        near = far = 0.0
        for i in range(1, count + 1):
            for j in range(i + 1, count + 1):
                weak, strong = similarity[i - 1][s], similarity[j - 1][s]
                near += math.exp(scale * (strong - weak + margin))
                far += math.exp(scale * (weak - strong - j * max_gap)) if max_gap else 0.0
        total += math.log1p(near) / scale + (math.log1p(far) / scale if max_gap else 0.0)
    return total / sources


@pytest.mark.parametrize("max_gap", [None, 0.2])
def test_ranking_equals_naive_loop(max_gap: float | None) -> None:
    similarity = torch.rand(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = intensity_ranking_loss(similarity, 0.11, 32.0, max_gap)
    assert loss.item() == pytest.approx(naive_ranking(similarity.tolist(), 0.11, 32.0, max_gap), rel=1e-12)


@pytest.mark.parametrize("max_gap", [None, 0.2])
def test_ranking_gradient(max_gap: float | None) -> None:
    similarity = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    gate = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(lambda s: intensity_ranking_loss(s, 0.1, 8.0, max_gap, gate), similarity)


def test_ranking_is_small_where_order_holds_and_large_where_it_is_reversed() -> None:
    ordered = torch.tensor([[0.9], [0.7], [0.5]])
    assert intensity_ranking_loss(ordered, 0.1, 32.0) < 0.01 < intensity_ranking_loss(ordered.flip(0), 0.1, 32.0)


def test_scale_of_ten_thousand_does_not_overflow() -> None:
    similarity = torch.tensor([[-1.0], [1.0]], requires_grad=True)
    loss = intensity_ranking_loss(similarity, 0.1, 1e4, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(2.1, rel=1e-4)
    assert similarity.grad.isfinite().all()


def test_closed_gates_give_a_differentiable_zero() -> None:
    similarity = torch.rand(3, 4, requires_grad=True)
    loss = intensity_ranking_loss(similarity, 0.1, 32.0, gate=torch.zeros(4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and similarity.grad.abs().sum() == 0


def test_gate_is_a_mean_over_open_sources() -> None:
    similarity = torch.rand(3, 4)
    gate = torch.tensor([True, False, True, False])
    expected = intensity_ranking_loss(similarity[:, gate], 0.1, 32.0)
    torch.testing.assert_close(intensity_ranking_loss(similarity, 0.1, 32.0, gate=gate), expected)


def test_class_shares_give_the_means_of_classes() -> None:
    z = torch.arange(8.0).view(4, 2)
    means = class_shares(torch.tensor([3, 1, 3, 1]), z.dtype) @ z
    torch.testing.assert_close(means, torch.tensor([[2.0, 3], [4, 5], [2, 3], [4, 5]]))


def module(dim: int = 6, **changes: object) -> IntensityRanking:
    torch.manual_seed(0)
    return IntensityRanking(dim, **(SETTINGS | changes)).double()


def naive_terms(m: IntensityRanking, z: torch.Tensor, anchors: torch.Tensor, seed: int) -> tuple[float, float]:
    """Both terms sample by sample, from methods.md 3."""

    def h(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(normalize(m.projection @ x, dim=0))

    directions = torch.randn(m.count, *z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(seed))
    similarity, anchor_terms = [], []
    for i in range(len(z)):
        if normalize(z[i], dim=0) @ normalize(anchors[i], dim=0) < m.gate:
            continue
        column, total = [], 0.0
        for j in range(m.count):
            u = directions[j, i] / directions[j, i].norm()
            r = h(z[i] + (j + 1) * m.intensity * z[i].norm() * u)
            column.append((r @ h(z[i])).item())
            total += math.exp(m.anchor_scale * (m.anchor_margin - (r @ h(anchors[i])).item()))
        similarity.append(column)
        anchor_terms.append(math.log1p(total) / m.anchor_scale)
    columns = [list(row) for row in zip(*similarity, strict=True)]
    return naive_ranking(columns, m.margin, m.scale, m.max_gap), sum(anchor_terms) / len(anchor_terms)


@pytest.mark.parametrize("with_proxies", [True, False])
def test_both_terms_equal_naive_loop(with_proxies: bool) -> None:
    m, labels = module(gate=-0.2), torch.tensor([0, 1, 0, 1, 2])
    z = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    proxies = (
        torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) if with_proxies else None
    )
    terms = m(z, labels, proxies, torch.Generator().manual_seed(3))
    anchors = proxies[labels] if with_proxies else class_shares(labels, z.dtype) @ normalize(z, dim=1)
    assert [t.item() for t in terms[:2]] == pytest.approx(list(naive_terms(m, z, anchors, 3)), rel=1e-10)
    cosine = (normalize(z, dim=1) * normalize(anchors, dim=1)).sum(1)
    assert terms[2].item() == pytest.approx((cosine >= m.gate).double().mean().item())


@pytest.mark.parametrize("with_proxies", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_terms_gradcheck(with_proxies: bool, shared: bool) -> None:
    m, labels = module(gate=-1.0, shared_directions=shared), torch.tensor([0, 1, 0])
    z = torch.randn(3, 6, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(1))
    proxies = torch.randn(2, 6, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(2))

    def total(z: torch.Tensor, proxies: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
        given = z, labels, proxies if with_proxies else None, torch.Generator().manual_seed(3)
        rank, anchor, _ = torch.func.functional_call(m, {"projection": projection}, given)
        return rank + anchor

    assert torch.autograd.gradcheck(total, (z, proxies, m.projection))


def test_order_of_classes_does_not_matter() -> None:
    m, z = module(), torch.randn(4, 6, dtype=torch.float64)
    one = m(z, torch.tensor([0, 0, 1, 1]), None, torch.Generator().manual_seed(0))
    other = m(z, torch.tensor([5, 5, 2, 2]), None, torch.Generator().manual_seed(0))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("z", [torch.ones(4, 6), torch.zeros(4, 6)], ids=["identical", "zero"])
def test_degenerate_embeddings_have_finite_gradients(z: torch.Tensor) -> None:
    z = z.double().requires_grad_()
    sum(module()(z, torch.tensor([0, 0, 1, 1]), None, torch.Generator().manual_seed(0))[:2]).backward()
    assert z.grad.isfinite().all()


def test_all_gates_closed_in_the_module() -> None:
    z = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    proxies, generator = torch.randn(4, 6).double(), torch.Generator().manual_seed(0)
    rank, anchor, share = module(gate=1.0)(z, torch.arange(4), proxies, generator)
    (rank + anchor).backward()
    assert rank.item() == anchor.item() == share.item() == 0 and z.grad.abs().sum() == 0


def test_low_precision_is_computed_in_float32() -> None:
    m, labels = module().float(), torch.tensor([0, 0, 1, 1])
    z = torch.randn(4, 6).bfloat16().requires_grad_()
    low = m(z, labels, None, torch.Generator().manual_seed(0))
    sum(low[:2]).backward()
    assert low[0].dtype == torch.float32 and z.grad.dtype == torch.bfloat16 and z.grad.isfinite().all()
    torch.testing.assert_close(low, m(z.float(), labels, None, torch.Generator().manual_seed(0)), rtol=0, atol=0)


def test_synthetics_lie_at_their_intensity() -> None:
    z = torch.randn(50, 16, dtype=torch.float64)
    synthetics = synthesize(z, 0.3, 4, torch.Generator().manual_seed(0))
    distance = (synthetics - z).norm(dim=2) / z.norm(dim=1)
    torch.testing.assert_close(distance, 0.3 * torch.arange(1.0, 5, dtype=torch.float64)[:, None].expand(4, 50))


def test_intensity_zero_is_the_source() -> None:
    z = torch.randn(5, 3)
    torch.testing.assert_close(synthesize(z, 0.0, 2, torch.Generator()), z.expand(2, 5, 3))


def test_directions_are_uniform_independent_or_shared() -> None:
    z = torch.ones(20_000, 3, dtype=torch.float64)
    directions = synthesize(z, 1.0, 1, torch.Generator().manual_seed(0))[0] - z
    assert directions.mean(0).abs().max() < 0.05
    torch.testing.assert_close(torch.cov(directions.T), torch.eye(3).double(), atol=0.05, rtol=0)
    shared = synthesize(z[:4], 1.0, 2, torch.Generator().manual_seed(0), shared=True) - z[:4]
    assert (shared[:, 0] == shared[:, 3]).all() and (shared[0] != shared[1]).all()
