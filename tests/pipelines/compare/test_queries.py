"""Query by query: counts against a naive loop, and tests that are wrong as seldom as they say."""

import numpy as np
import pytest

from pipelines.compare import queries
from pipelines.compare.queries import PairedQueries, bootstrap_classes, compare_queries, most_moved
from pipelines.compare.statistics import p_value
from pipelines.compare.wording import QUERY_METRICS, QueryLine, format_class, format_query_line

REPETITIONS = 100
SEEDS = tuple("01234567")


@pytest.fixture
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many are enough where what counts is how often a test is right."""
    monkeypatch.setattr(queries, "RESAMPLES", 1999)


def paired(gains: np.ndarray, classes: np.ndarray, group: str = "other") -> PairedQueries:
    """Both metrics say the same."""
    names = [f"c{number}" for number in range(classes.max() + 1)]
    return PairedQueries(group, SEEDS[: len(gains)], classes, names, dict.fromkeys(QUERY_METRICS, gains))


def draw_gains(
    rng: np.random.Generator,
    gain: float = 0.0,
    seed: float = 0.004,
    cell: float = 0.03,
    pairs: int = 8,
    count: int = 30,
) -> tuple[np.ndarray, np.ndarray]:
    """Gains of queries: what a seed adds to all classes, to one class, and to one query."""
    classes = np.repeat(np.arange(count), rng.integers(4, 30, count))
    gains = gain + rng.normal(0, seed, (pairs, 1)) + rng.normal(0, cell, (pairs, count))[:, classes]
    return gains + rng.normal(0, 0.2, gains.shape), classes


def test_counts_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    classes, scores = rng.integers(0, 5, 60), rng.integers(0, 3, (2, 3, 60)) / 2
    classes[classes == 2] = 3  # a class without queries
    found = compare_queries([paired(scores[1] - scores[0], classes)])
    for gain in found.classes[: len(found.classes) // 2]:
        means = [
            sum(scores[1, s, q] - scores[0, s, q] for s in range(3)) / 3
            for q in range(60)
            if f"c{classes[q]}" == gain.label
        ]
        won, lost = sum(m > 1e-12 for m in means), sum(m < -1e-12 for m in means)
        assert gain[3:6] == (len(means), won, lost) and gain.gain == pytest.approx(sum(means) / len(means))
    assert [gain.label for gain in found.classes] == ["c0", "c1", "c3", "c4"] * 2
    line = found.lines[0]
    assert line.queries == 60 and line.classes == 4 and line.seeds == 3
    assert line.won == sum(c.won for c in found.classes) / 2 and line.lost == sum(c.lost for c in found.classes) / 2
    assert line.gain == pytest.approx((scores[1] - scores[0]).mean())
    assert line.p_seeds == p_value((scores[1] - scores[0]).mean(1))
    texts = format_query_line(line)
    assert texts[2:6] == ("60", str(line.won), str(line.lost), str(60 - line.won - line.lost)) and texts[-1] == "no"
    lost, won = most_moved(found.classes, "other", 2)
    totals = {c.label: c.gain * c.queries for c in found.classes}
    assert all(totals[c.label] < 0 for c, _ in lost) and all(totals[c.label] > 0 for c, _ in won)
    moved = [pair[0].label for pair in (*lost, *reversed(won))]
    assert moved == sorted(moved, key=totals.__getitem__) and min(totals, key=totals.__getitem__) in moved
    assert format_class(won[0])[0] == won[0][0].label


def test_the_bootstrap_is_that_of_a_loop() -> None:
    rng = np.random.default_rng(3)
    gains, classes = draw_gains(rng, gain=0.03, pairs=1, count=8)
    (low, high), p = bootstrap_classes(gains[0], classes)
    by_class = [gains[0, classes == c] for c in range(8)]

    def ratio_and_error(chosen: list[np.ndarray]) -> tuple[float, float]:
        ratio = sum(c.sum() for c in chosen) / sum(len(c) for c in chosen)
        squares = sum((c.sum() - ratio * len(c)) ** 2 for c in chosen) * 8 / 7
        return ratio, squares**0.5 / sum(len(c) for c in chosen)

    gain, error = ratio_and_error(by_class)
    far = []
    for _ in range(10_000):
        drawn, its_error = ratio_and_error([by_class[c] for c in rng.integers(0, 8, 8)])
        far.append(abs(drawn - gain) / its_error if its_error else np.inf)
    assert p == pytest.approx(np.mean(np.array(far) >= gain / error), abs=0.015)
    assert (high - low) / 2 == pytest.approx(np.quantile(far, 0.95) * error, rel=0.06)
    assert (low + high) / 2 == pytest.approx(gain) == pytest.approx(gains.mean())


def test_too_little_to_resample() -> None:
    classes = np.repeat(np.arange(6), 4)
    assert bootstrap_classes(np.zeros(24), classes) == ((0, 0), 1)
    (low, high), p = bootstrap_classes(np.full(24, 0.25), classes)
    assert low == high == 0.25 and p < 0.001
    assert bootstrap_classes(np.arange(4.0), np.zeros(4, int)) == (None, None)
    one_class = (classes == 3) * 0.5  # it is in two of three resamples
    interval, p = bootstrap_classes(one_class, classes)
    assert interval is None and p > 0.3
    few = compare_queries([paired(one_class[None], classes)])
    assert not few.lines[0].differs and few.lines[0].p_seeds is None
    assert "one pair of runs: p, classes says whether these two models differ" in few.warnings[0]
    assert "the queries are of 6 classes" in few.warnings[1]
    assert format_query_line(few.lines[0])[-1] == "no (these two models)"


@pytest.mark.usefixtures("fewer_resamples")
@pytest.mark.parametrize("shape", ["normal", "skewed", "right or wrong"])
def test_intervals_over_20_classes_hold_the_truth_as_often_as_they_say(shape: str) -> None:
    rng, held = np.random.default_rng(0), 0
    for _ in range(300):
        classes = np.repeat(np.arange(20), rng.integers(4, 30, 20))
        if shape == "right or wrong":
            before = rng.beta(8, 2, 20)
            after = rng.beta(20 * before, 20 * (1 - before))
            gains = (rng.random(len(classes)) < after[classes]) - 1.0 * (rng.random(len(classes)) < before[classes])
        else:
            by_class = rng.normal(0, 0.03, 20) if shape == "normal" else rng.exponential(0.03, 20) - 0.03
            gains = by_class[classes] + rng.normal(0, 0.1, len(classes))
        low, high = bootstrap_classes(gains, classes)[0]
        held += low <= 0 <= high
    assert 0.925 <= held / 300 <= 0.985  # two standard deviations about 0.95


def lines_of(gain: float) -> list[QueryLine]:
    rng = np.random.default_rng(5)
    return [compare_queries([paired(*draw_gains(rng, gain))]).lines[0] for _ in range(REPETITIONS)]


@pytest.mark.usefixtures("fewer_resamples")
def test_equal_configs_do_not_differ_and_a_gain_is_found() -> None:
    """The null test: 8 seeds each. The test over classes alone would be wrong too often, as seeds are lucky for all."""
    equal = lines_of(0.0)
    assert sum(line.differs for line in equal) <= 5
    rng, by_classes = np.random.default_rng(6), 0
    for _ in range(REPETITIONS):
        gains, classes = draw_gains(rng, seed=0.01)
        by_classes += bootstrap_classes(gains.mean(0), classes)[1] <= 0.05
    assert by_classes > 10
    assert sum(line.differs and line.gain > 0 for line in lines_of(0.015)) >= 75


def test_p_values_are_adjusted_for_the_number_of_configs() -> None:
    gains, classes = draw_gains(np.random.default_rng(7), gain=0.012)
    alone = compare_queries([paired(gains, classes)]).lines[0]
    three = compare_queries([paired(gains, classes, name) for name in "abc"])
    assert [line.group for line in three.lines[:3]] == ["a", "b", "c"]
    assert three.lines[0].p_classes == pytest.approx(min(1, 3 * alone.p_classes))
    assert three.lines[0].p_seeds == pytest.approx(min(1, 3 * alone.p_seeds))
    assert three.lines[0].interval == alone.interval
