import math

import pytest
import torch
from torch.nn.functional import normalize

from dml_core import geometry
from dml_core.geometry import alignment, distances_to_means, effective_rank, spectrum, uniformity


def test_effective_rank_is_the_number_of_directions_that_are_used_alike() -> None:
    axes = torch.eye(8).repeat(3, 1)
    assert effective_rank(spectrum(torch.cat([axes, -axes]))) == pytest.approx(8)
    assert effective_rank(spectrum(torch.arange(5.0)[:, None] * torch.ones(7))) == pytest.approx(1, abs=1e-4)
    gaussian = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0))
    assert effective_rank(spectrum(gaussian)) == pytest.approx(8, rel=1e-3)
    assert effective_rank(spectrum(gaussian * torch.tensor([1, 1, 1, 0, 0, 0, 0, 0]))) == pytest.approx(3, rel=1e-3)


@pytest.mark.parametrize("t", [1.0, 2.0])
def test_two_point_classes_are_aligned_and_as_uniform_as_their_pairs(t: float) -> None:
    z = torch.tensor([[1.0, 0.0]] * 3 + [[-1.0, 0.0]] * 5)
    assert alignment(distances_to_means(z, torch.tensor([4] * 3 + [2] * 5))) == 0
    same, different = 3 * 2 + 5 * 4, 2 * 3 * 5
    assert uniformity(z, t) == pytest.approx(math.log((same + different * math.exp(-4 * t)) / (same + different)))
    assert uniformity(torch.eye(6), t) == pytest.approx(-2 * t)


def test_measures_are_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "BLOCK", 7)
    generator = torch.Generator().manual_seed(0)
    z = normalize(torch.randn(30, 4, generator=generator, dtype=torch.float64), dim=1)
    labels = torch.randint(5, (30,), generator=generator)
    square = torch.cdist(z, z).square()
    pairs = [(i, j) for i in range(30) for j in range(30) if i != j]
    of_a_class = [square[i, j].item() for i, j in pairs if labels[i] == labels[j]]
    assert alignment(distances_to_means(z, labels)) == pytest.approx(sum(of_a_class) / len(of_a_class))
    spread = sum(math.exp(-2 * square[i, j]) for i, j in pairs) / len(pairs)
    assert uniformity(z) == pytest.approx(math.log(spread))


def test_distances_are_to_the_own_mean_and_the_nearest_other() -> None:
    z = torch.tensor([[0.0, 0.0], [10.0, 0.0], [2.0, 0.0], [10.0, 2.0], [10.0, 30.0]])
    distances = distances_to_means(z, torch.tensor([7, 3, 7, 3, 9]))  # means (10, 1), (1, 0), (10, 30)
    assert distances.to_own.tolist() == [1, 1, 1, 1, 0]
    assert distances.sizes.tolist() == [2, 2, 1]
    assert distances.to_next.tolist() == pytest.approx([82**0.5, 82**0.5, 29])
    assert distances.mean_by_class(torch.arange(5.0)).tolist() == [2, 1, 4]
    assert distances_to_means(z, torch.zeros(5, dtype=torch.int64)).to_next.tolist() == [0]
