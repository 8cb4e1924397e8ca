"""Two configs compared query by query: who wins, in which classes, and whether other classes would say the same.

Queries of a class are not independent: they share their matches, and what they are taken for. So whole classes are
resampled, with all their queries. That asks whether *these trained models* differ on other classes: the luck of their
seeds, which all classes share, stays in it. So a difference counts only where neither the test over classes nor the one
over seeds takes it for luck.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipelines.compare.statistics import RESAMPLES, holm, p_value
from pipelines.compare.wording import QUERY_METRICS, ClassGain, Interval, QueryLine

ALPHA = 0.05

FEW_CLASSES = 10  # with fewer, resampled classes say little

SMALLEST = 1e-9  # what rounding makes at most of a difference that is none

SMALLEST_ERROR = 1e-6  # and of a standard error that is none, in units of the standard error of all classes

RESAMPLED_AT_ONCE = 4_000_000  # classes drawn at a time: 160 MB


Moved = tuple[ClassGain, ClassGain]  # a class in R@1 and in MAP@R


class PairedQueries(NamedTuple):
    """The queries of a test, as a config and the baseline have answered them, in pairs of runs.

    Attributes:
        group: The config's label.
        seeds: The seed of each of S pairs.
        classes: (Q,) the class of each query that has a match, a place in `class_names`.
        class_names: Of all classes of the test.
        gains: Name of a metric -> (S, Q), the config's score of a query less the baseline's.
    """

    group: str
    seeds: tuple[str, ...]
    classes: np.ndarray
    class_names: Sequence[str]
    gains: Mapping[str, np.ndarray]


class QueryComparison(NamedTuple):
    """Configs compared with a baseline query by query.

    Attributes:
        warnings: What makes the comparison weaker than its numbers look.
        lines: A line for each metric and config.
        classes: A line for each metric, config and class.
    """

    warnings: list[str]
    lines: list[QueryLine]
    classes: list[ClassGain]

    def to_json(self) -> dict[str, Any]:
        """Return what `dml compare --queries --json` prints under "queries"."""
        lines, classes = ([line._asdict() for line in part] for part in (self.lines, self.classes))
        return {"warnings": self.warnings, "lines": lines, "classes": classes}


def compare_queries(configs: Sequence[PairedQueries]) -> QueryComparison:
    """Compare configs with a baseline query by query.

    Args:
        configs: Each with the same metrics.
    """
    lines = [line for metric in configs[0].gains for line in _lines_of_metric(configs, metric)]
    classes = [gain for config in configs for metric in config.gains for gain in gains_by_class(config, metric)]
    return QueryComparison(_check(configs), lines, classes)


def _lines_of_metric(configs: Sequence[PairedQueries], metric: str) -> list[QueryLine]:
    """Compute a line for each config; p-values are adjusted (Holm) over the configs."""
    intervals, by_classes, by_seeds = [], [], []
    for config in configs:
        gains = config.gains[metric]
        interval, p = bootstrap_classes(gains.mean(0), config.classes)
        intervals.append(interval)
        by_classes.append(p)
        by_seeds.append(p_value(gains.mean(1)))
    lines = []
    for config, interval, p_classes, p_seeds in zip(configs, intervals, holm(by_classes), holm(by_seeds), strict=True):
        gain = config.gains[metric].mean(0)
        tests = [p for p in (p_classes, p_seeds) if p is not None]
        lines.append(
            QueryLine(
                config.group,
                metric,
                seeds=len(config.seeds),
                classes=len(np.unique(config.classes)),
                queries=len(gain),
                won=int((gain > SMALLEST).sum()),
                lost=int((gain < -SMALLEST).sum()),
                gain=float(gain.mean()),
                interval=interval,
                p_classes=p_classes,
                p_seeds=p_seeds,
                differs=bool(tests) and max(tests) <= ALPHA,
            )
        )
    return lines


def gains_by_class(config: PairedQueries, metric: str) -> list[ClassGain]:
    """Count what each class has won and lost, in the order of `class_names`; those without queries are left out."""
    gain, classes = config.gains[metric].mean(0), len(config.class_names)
    queries = np.bincount(config.classes, minlength=classes)
    won, lost = (np.bincount(config.classes[sign * gain > SMALLEST], minlength=classes) for sign in (1, -1))
    mean = np.bincount(config.classes, gain, classes) / np.maximum(queries, 1)
    columns = (values.tolist() for values in (queries, won, lost, mean))
    return [
        ClassGain(config.group, metric, label, *tally)
        for label, *tally in zip(config.class_names, *columns, strict=True)
        if tally[0]
    ]


def most_moved(classes: Sequence[ClassGain], group: str, number: int) -> tuple[list[Moved], list[Moved]]:
    """Return the classes that take most from a config's MAP@R and those that add most to it, those with most first.

    Args:
        classes: Of a QueryComparison.
        group: The config's label.
        number: How many of each at most.

    Returns:
        For each class its gain in each of QUERY_METRICS.
    """
    recall, precision = ([c for c in classes if (c.group, c.metric) == (group, metric)] for metric in QUERY_METRICS)
    ordered = sorted(zip(recall, precision, strict=True), key=lambda moved: moved[1].gain * moved[1].queries)
    lost = [moved for moved in ordered if moved[1].gain < -SMALLEST]
    won = [moved for moved in reversed(ordered) if moved[1].gain > SMALLEST]
    return lost[:number], won[:number]


def bootstrap_classes(gains: np.ndarray, classes: np.ndarray) -> tuple[Interval | None, float | None]:
    """Test whether the mean over queries is zero, by a bootstrap of whole classes.

    It is the bootstrap-t, symmetric: each resample's distance from the mean counts in units of its own standard error.
    Of 20 classes a percentile interval, which does without, holds the truth 91 times of 100 instead of 95.

    Args:
        gains: (Q,) a difference for each query.
        classes: (Q,) the class of each query, in 0..C-1.

    Returns:
        The 95 % interval of the mean, None where too few classes differ from the rest to tell, and the two-sided
        p-value of "no difference". Both None for a single class.
    """
    sizes = np.bincount(classes).astype(float)
    sums = np.bincount(classes, gains)[sizes > 0]
    sizes = sizes[sizes > 0]
    count, mean = len(sizes), gains.mean()
    if count < 2:
        return None, None
    correction = count / (count - 1)
    residuals = sums - mean * sizes  # (C,) of the mean, which is a ratio of two sums over classes
    error = np.sqrt(correction * (residuals @ residuals)) / sizes.sum()
    if error <= SMALLEST * max(1.0, abs(mean)):  # all classes say the same
        return (mean, mean), 1.0 if abs(mean) <= SMALLEST else 1 / (RESAMPLES + 1)
    moments = np.stack([residuals, sizes, residuals**2, residuals * sizes, sizes**2])  # (5, C)
    rng, distances = np.random.default_rng(0), []
    at_once = max(1, RESAMPLED_AT_ONCE // count)
    for start in range(0, RESAMPLES, at_once):
        drawn = rng.integers(0, count, (min(at_once, RESAMPLES - start), count))
        r, n, rr, rn, nn = (moment[drawn].sum(1) for moment in moments)
        shift = r / n
        errors = np.sqrt(np.maximum(rr - 2 * shift * rn + shift**2 * nn, 0) * correction) / n
        # A resample of classes that all say the same is infinitely far from anything else that they say.
        far = np.where(np.abs(shift) <= SMALLEST_ERROR * error, 0.0, np.inf)
        distances.append(np.divide(np.abs(shift), errors, out=far, where=errors > SMALLEST_ERROR * error))
    ordered = np.sort(np.concatenate(distances))
    width = ordered[int(np.ceil((1 - ALPHA) * (RESAMPLES + 1))) - 1] * error
    as_far = len(ordered) - np.searchsorted(ordered, abs(mean) / error * (1 - SMALLEST))
    interval = (float(mean - width), float(mean + width)) if np.isfinite(width) else None
    return interval, float((1 + as_far) / (RESAMPLES + 1))


def _check(configs: Sequence[PairedQueries]) -> list[str]:
    """List what makes the comparison weaker than its numbers look."""
    warnings = [
        f"{config.group}: one pair of runs: p, classes says whether these two models differ on other classes, and not "
        "whether the setting is better; that takes pairs of several seeds"
        for config in configs
        if len(config.seeds) == 1
    ]
    classes = len(np.unique(configs[0].classes))
    if classes < FEW_CLASSES:
        warnings.append(f"the queries are of {classes} classes: the test over classes needs {FEW_CLASSES} to hold")
    return warnings
