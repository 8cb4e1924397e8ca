import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dml_core import variation
from dml_core.gather import rank, world_size
from dml_core.variation import (
    TILES,
    ClassVariation,
    Tiles,
    nearest_classes,
    neighbor_correction,
    neighbor_weight,
)
from tests import ranks

SHARED = Path(os.environ.get("DML_SHARED", Path(__file__).parents[3] / "shared"))
CLASSES, DIM = 6, 5


@pytest.fixture(scope="module")
def golden():
    return np.load(SHARED / "golden" / "published_code.npz")


def a_set(seed: int, samples: int = 60, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Classes of unequal sizes; class 3 has one sample, class 4 none."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (samples,), generator=generator)
    labels = torch.cat([labels[(labels != 3) & (labels != 4)], torch.tensor([3])])
    return torch.randn(len(labels), DIM, generator=generator) * (1 + labels[:, None]) + 3 * labels[:, None], labels


def naive_update(state: dict, z: np.ndarray, labels: np.ndarray, momentum: float, full: bool) -> None:
    for k in range(CLASSES):
        of_class = [x for x, y in zip(z, labels, strict=True) if y == k]
        if not of_class:
            continue
        mean = sum(of_class) / len(of_class)
        outer = (lambda d: np.outer(d, d)) if full else (lambda d: d * d)
        new = sum(outer(x - mean) for x in of_class) / len(of_class)
        w = max(len(of_class) / (len(of_class) + state["count"][k]), 1 - momentum)
        step = state["mean"][k] - mean
        state["variance"][k] = (1 - w) * state["variance"][k] + w * new + w * (1 - w) * outer(step)
        state["mean"][k] = (1 - w) * state["mean"][k] + w * mean
        state["count"][k] += len(of_class)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_equals_the_loop_over_two_updates(covariance):
    full = covariance == "full"
    ours = ClassVariation(CLASSES, DIM, 0.2, covariance).double()
    shapes = {"mean": (CLASSES, DIM), "variance": (CLASSES, DIM, DIM) if full else (CLASSES, DIM), "count": (CLASSES,)}
    state = {key: np.zeros(shape) for key, shape in shapes.items()}
    for seed in (0, 1):
        z, labels = a_set(seed)
        ours.update(z, labels)
        naive_update(state, z.double().numpy(), labels.numpy(), 0.2, full)
    for key in shapes:
        np.testing.assert_allclose(getattr(ours, key).numpy(), state[key], rtol=1e-9, atol=1e-12)
    assert ours.size.tolist() == [int((labels == k).sum()) for k in range(CLASSES)]
    assert ours.variance[3].any() and not ours.variance[4].any()  # one sample an update, and none


def test_golden(golden):
    ours = ClassVariation(CLASSES, DIM, float(golden["iaa_var_momentum"]))
    for step in "01":
        ours.update(torch.from_numpy(golden[f"iaa_var_f{step}"]), torch.from_numpy(golden[f"iaa_var_y{step}"]))
        for key, name in (("mean", "mean"), ("variance", "cov"), ("count", "amount")):
            published = golden[f"iaa_var_{name}{step}"]
            np.testing.assert_allclose(getattr(ours, key).numpy(), published, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("covariance", ["diag", "full"])
@pytest.mark.parametrize("chunk", [1, 2**17])
def test_batches_in_any_order_equal_one_update(covariance, chunk, monkeypatch):
    z, labels = a_set(0)
    whole = ClassVariation(CLASSES, DIM, covariance=covariance)
    whole.update(z, labels)
    monkeypatch.setattr(variation, "CHUNK", chunk)
    monkeypatch.setattr(variation, "VARIANCE_CHUNK", chunk)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(1))
    parts = ClassVariation(CLASSES, DIM, covariance=covariance)
    parts.begin()
    for rows in order.split(7):
        parts.add(z[rows], labels[rows])
    parts.finish()
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[key], value)


def test_sums_survive_a_large_offset():
    z, labels = a_set(0)
    near, far = ClassVariation(CLASSES, DIM).double(), ClassVariation(CLASSES, DIM).double()
    near.update(z.double(), labels)
    far.update(z.double() + 1e4, labels)
    torch.testing.assert_close(far.variance, near.variance, rtol=1e-6, atol=1e-6)


def test_low_precision_embeddings():
    z, labels = a_set(0)
    low, same = ClassVariation(CLASSES, DIM), ClassVariation(CLASSES, DIM)
    low.update(z.bfloat16(), labels)
    same.update(z.bfloat16().float(), labels)
    assert torch.equal(low.variance, same.variance) and low.variance.dtype == torch.float32


def run_rank(folder: Path) -> None:
    ours = ClassVariation(CLASSES, DIM).double()
    for seed in (0, 1):
        z, labels = a_set(seed)
        mine = [[slice(20), slice(20, None)], [slice(None), slice(0)]][seed][rank()]
        ours.update(z[mine].double(), labels[mine])
    torch.save(ours.state_dict(), folder / f"{rank()}.pt")


def test_shards_give_the_whole(tmp_path):
    """Two ranks with shards of unequal size, one of them empty the second time."""
    ranks.run(run_rank, 2, tmp_path)
    alone = ClassVariation(CLASSES, DIM).double()
    for seed in (0, 1):
        z, labels = a_set(seed)
        alone.update(z.double(), labels)
    for number in range(2):
        for key, value in torch.load(tmp_path / f"{number}.pt", weights_only=True).items():
            torch.testing.assert_close(value, alone.state_dict()[key], rtol=1e-12, atol=1e-12)


def wide_set(seed: int, scale: float) -> tuple[Tensor, Tensor]:
    """Numbers from 1e-5 to 1e6 times `scale`, the largest last, float64."""
    z, labels = a_set(seed)
    z = z.double() * scale
    z[::7] *= 1e-5
    z[-1] *= 1e5
    return z, labels


def updated_by_whole_sets(covariance: str, scale: float) -> ClassVariation:
    ours = ClassVariation(CLASSES, DIM, covariance=covariance).double()
    for seed in (0, 1):
        ours.update(*wide_set(seed, scale))
    return ours


def assert_same_bits(ours: ClassVariation, other: dict[str, Tensor]) -> None:
    for key, value in ours.state_dict().items():
        assert value.isfinite().all() and torch.equal(other[key], value), key


@settings(deadline=None, max_examples=40)
@given(st.randoms(use_true_random=False), st.sampled_from(["diag", "full"]), st.sampled_from([1e-6, 1, 1e6]))
def test_same_bits_in_any_order_and_batches(random, covariance, scale):
    ours = ClassVariation(CLASSES, DIM, covariance=covariance).double()
    for seed in (0, 1):
        z, labels = wide_set(seed, scale)
        order = torch.tensor(random.sample(range(len(z)), len(z)))
        cuts = sorted(random.choices(range(len(z) + 1), k=random.randrange(10)))
        ours.begin()
        for rows in order.tensor_split(cuts):
            ours.add(z[rows], labels[rows])
        ours.finish()
    assert_same_bits(updated_by_whole_sets(covariance, scale), ours.state_dict())


CASES = [("diag", 1e-6), ("diag", 1), ("diag", 1e6), ("full", 1)]


def run_dealt(folder: Path) -> None:
    """Uneven shards; rank 0 has none the second time, and the last has the largest number in a batch of its own."""
    for case, (covariance, scale) in enumerate(CASES):
        ours = ClassVariation(CLASSES, DIM, covariance=covariance).double()
        for seed in (0, 1):
            z, labels = wide_set(seed, scale)
            parts = 1 + np.arange(seed, world_size()).cumsum()  # the last rank has what is left
            starts = [0] * seed + [0, *parts.tolist()][: world_size() - seed] + [len(z)]
            mine = torch.arange(starts[rank()], starts[rank() + 1])
            ours.begin()
            for rows in (mine[:-1], mine[-1:]):
                ours.add(z[rows], labels[rows])
            ours.finish()
        torch.save(ours.state_dict(), folder / f"{case}-{rank()}.pt")


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_same_bits_on_any_number_of_ranks(world, tmp_path):
    ranks.run(run_dealt, world, tmp_path)
    for case, arguments in enumerate(CASES):
        alone = updated_by_whole_sets(*arguments)
        for number in range(world):
            assert_same_bits(alone, torch.load(tmp_path / f"{case}-{number}.pt", weights_only=True))


@pytest.mark.parametrize("covariance", ["diag", "full"])
@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
def test_exact_at_any_scale(scale, covariance):
    """The spread of each class is 100 times smaller than that of all; numbers of many sizes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20).repeat_interleave(torch.arange(5, 25))
    centers = torch.randn(20, DIM, generator=generator, dtype=torch.float64)
    z = centers[labels] + torch.randn(len(labels), DIM, generator=generator, dtype=torch.float64) / 100
    for bit in range(0, 26, 5):
        given_z = z * scale * 2**bit
        ours = ClassVariation(20, DIM, covariance=covariance).double()
        ours.update(given_z, labels)
        for k in range(20):
            x = given_z[labels == k].numpy().astype(np.longdouble)
            centered = x - x.mean(0)
            expected = centered.T @ centered / len(x)
            deviation = np.sqrt(expected.diagonal())
            found, unit = ours.variance[k].numpy(), np.outer(deviation, deviation)
            if covariance == "diag":
                expected, unit = expected.diagonal(), unit.diagonal()
            assert (abs(found - expected) < 5e-8 * unit).all()
            assert (abs(ours.mean[k].numpy() - x.mean(0)) < 5e-8 * abs(x.mean(0))).all()


@pytest.mark.parametrize("covariance", ["diag", "full"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_its_class_alone(number, covariance):
    z, labels = a_set(0)
    sound, ours = (ClassVariation(CLASSES, DIM, covariance=covariance) for _ in range(2))
    sound.update(z, labels)
    z[labels.tolist().index(5), 2] = number
    ours.update(z, labels)
    affected = torch.zeros(CLASSES, DIM, dtype=torch.bool)
    affected[5, 2] = True
    assert torch.equal(~ours.mean.isfinite(), affected)
    assert torch.equal(ours.mean[~affected], sound.mean[~affected])
    if covariance == "full":
        affected = affected[:, :, None] | (affected[:, None])
    assert torch.equal(~ours.variance.isfinite(), affected)
    assert torch.equal(ours.variance[~affected], sound.variance[~affected])


@given(st.lists(st.floats(-1e150, 1e150), min_size=1, max_size=8), st.randoms())
def test_sums_of_all_finite_numbers(numbers, random):
    """Each in a batch of its own: the same statistics in any order, and the mean is near the exact one."""
    states = []
    for _ in range(2):
        ours = ClassVariation(1, 1).double()
        ours.begin()
        for number in numbers:
            ours.add(torch.tensor([[number]], dtype=torch.float64), torch.tensor([0]))
        ours.finish()
        states.append(ours.state_dict())
        random.shuffle(numbers)
    for key, value in states[0].items():
        assert torch.equal(states[1][key], value), key
    expected, largest = math.fsum(numbers) / len(numbers), max(map(abs, numbers))
    assert abs(states[0]["mean"].item() - expected) <= largest * 2**-47 + 1e-300


def test_unknown_covariance_is_refused():
    with pytest.raises(ValueError, match="diag or full, not 'diagonal'"):
        ClassVariation(CLASSES, DIM, covariance="diagonal")


def test_golden_neighbor_weight(golden):
    n = torch.from_numpy(golden["iaa_alpha_n"])
    ours = neighbor_weight(n, float(golden["iaa_alpha_beta"]), int(golden["iaa_alpha_tau"]))
    below = n < 40
    np.testing.assert_allclose(ours[below].numpy(), golden["iaa_alpha"][below.numpy()], rtol=1e-5)
    assert not ours[n > 40].any() and ours.dtype == n.dtype


def test_neighbor_weight_of_few_samples():
    assert neighbor_weight(torch.tensor([0, 1, 2, 40, 41])).tolist() == pytest.approx(
        [1, 1, 1 / (1 + np.log(1.1)), 1 / (1 + np.log(4.9)), 0]
    )


def naive_correction(mean, variance, count, neighbors=25, beta=0.1, gamma=0.1, tau=40, every=1):
    """Row by row, with all real candidates of a row in the scaling, or of variances the neighbors and every n-th."""
    classes, out = len(mean), variance.copy()
    real = [i for i in range(classes) if count[i] > 1]
    overall = sum(count[i] * variance[i] for i in real) / sum(count[i] for i in real)
    for k in range(classes):
        candidates = [i for i in real if i != k]
        by_mean = np.array([np.linalg.norm(mean[k] ** 2 - mean[i] ** 2) for i in candidates])
        by_spread = np.array([np.linalg.norm(variance[k] - variance[i]) for i in candidates])
        local = overall
        if candidates:
            near = np.argsort(by_mean, kind="stable")[:neighbors]
            ends = [i in near or candidate in real[::every] for i, candidate in enumerate(candidates)]
            dm, dv = ((d - d[e].min()) / (np.ptp(d[e]) or 1) for d, e in ((by_mean, slice(None)), (by_spread, ends)))
            w = np.array([count[candidates[i]] * np.exp(-(dm[i] ** 2) / 2 - dv[i] ** 2 / 2) for i in near])
            local = sum(w[:, None] * variance[[candidates[i] for i in near]].reshape(len(w), -1)) / w.sum()
            local = local.reshape(variance[k].shape)
        n = max(count[k], 1)
        alpha = 1 / (1 + np.log(1 + beta * (n - 1))) if n <= tau else 0
        out[k] = (1 - alpha) * variance[k] + alpha * ((1 - gamma) * local + gamma * overall)
    return out


def statistics(classes: int, shape: tuple[int, ...] = (DIM,), seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(classes, DIM, generator=generator, dtype=dtype)
    count = torch.randint(1, 60, (classes,), generator=generator)
    count[::5] = 1
    variance = torch.rand(classes, *shape, generator=generator, dtype=dtype) * (count > 1).view(-1, *[1] * len(shape))
    return mean, variance, count


@pytest.mark.parametrize("shape", [(DIM,), (DIM, DIM)], ids=["diag", "full"])
@pytest.mark.parametrize(("classes", "neighbors"), [(60, 7), (60, 25), (12, 25), (3, 25)])
def test_correction_equals_the_loop(classes, neighbors, shape):
    mean, variance, count = statistics(classes, shape)
    ours = neighbor_correction(mean, variance, count, neighbors)
    oracle = naive_correction(mean.numpy(), variance.numpy(), count.tolist(), neighbors)
    np.testing.assert_allclose(ours.numpy(), oracle, rtol=1e-6, atol=1e-9)


def test_many_classes_are_scaled_by_a_sample(monkeypatch):
    mean, variance, count = statistics(60)
    monkeypatch.setattr(variation, "SAMPLE_SIZE", 15)
    ours = neighbor_correction(mean, variance, count, 7)
    every = -(-int((count > 1).sum()) // 15)
    assert every > 1
    oracle = naive_correction(mean.numpy(), variance.numpy(), count.tolist(), 7, every=every)
    np.testing.assert_allclose(ours.numpy(), oracle, rtol=1e-6, atol=1e-9)
    assert not np.allclose(oracle, naive_correction(mean.numpy(), variance.numpy(), count.tolist(), 7))


@pytest.mark.parametrize("tiles", [Tiles(7, 11, 200), TILES["cuda"]], ids=["small", "of a GPU"])
def test_correction_in_float32_and_in_tiles(tiles, monkeypatch):
    mean, variance, count = statistics(60)
    expected = neighbor_correction(mean, variance, count, 5)
    monkeypatch.setitem(TILES, "cpu", tiles)
    ours = neighbor_correction(mean.float(), variance.float(), count.float(), 5)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tiles", [Tiles(7, 11, 200), Tiles(64, 3, 200), TILES["cpu"]], ids=str)
@pytest.mark.parametrize("k", [1, 6, 100])
def test_nearest_classes_are_those_of_all_distances(k, tiles, monkeypatch):
    """Of classes that are candidates themselves, and of others."""
    monkeypatch.setitem(TILES, "cpu", tiles)
    generator = torch.Generator().manual_seed(0)
    x = 10 + torch.randn(50, DIM, generator=generator, dtype=torch.float64)
    candidates, rows = torch.arange(0, 50, 2), torch.randperm(50, generator=generator)[:33].sort().values
    near, farthest = nearest_classes(x, rows, candidates, k)
    distance = torch.cdist(x[rows], x[candidates])
    torch.testing.assert_close(farthest.sqrt(), distance.amax(1))
    distance.masked_fill_(rows[:, None] == candidates, torch.inf)
    best = distance.topk(min(k, len(candidates)), largest=False)
    assert torch.equal(near, torch.where(best.values < torch.inf, candidates[best.indices], rows[:, None]))
    assert (near[:, -1] == rows).any() == (k == 100)


def test_order_of_the_classes_does_not_matter():
    mean, variance, count = statistics(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    shuffled = neighbor_correction(mean[order], variance[order], count[order], 5)
    torch.testing.assert_close(shuffled, neighbor_correction(mean, variance, count, 5)[order])


def test_what_correction_leaves_alone():
    mean, variance, count = statistics(40)
    ours = neighbor_correction(mean, variance, count)
    assert torch.equal(ours[count > 40], variance[count > 40])
    assert ours[count == 1].gt(0).all() and not variance[count == 1].any()


def test_one_sample_has_its_neighbors_variation_alone():
    mean, variance, count = statistics(40)
    other = variance.clone()
    other[count == 1] += 7
    chosen = count == 1
    torch.testing.assert_close(
        neighbor_correction(mean, variance, count, gamma=1)[chosen],
        neighbor_correction(mean, other, count, gamma=1)[chosen],
    )


@pytest.mark.parametrize("count", [[1, 1, 1], [1, 5, 1], [0, 5, 9], [9, 9, 9]])
def test_degenerate_sets_give_finite_variances(count):
    n = torch.tensor(count)
    mean, variance = torch.ones(3, DIM), torch.ones(3, DIM) * (n > 1)[:, None]
    ours = neighbor_correction(mean, variance, n)  # all means and variances are the same
    torch.testing.assert_close(ours, torch.ones(3, DIM) if max(count) > 1 else torch.zeros(3, DIM))
