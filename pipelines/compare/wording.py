"""The lines of a comparison as text, and the names of metrics and rankings in tables."""

from collections.abc import Sequence
from typing import NamedTuple

# Prefixes of test metrics, and what is measured in each way.
RANKINGS = {"features": "raw features", "untrained": "untrained", "test": "trained"}
RANKINGS |= {"test_rerank": "trained, re-ranked", "test_exact": "trained, exact"}

METRIC_COLUMNS = {"recall_at_1": "R@1", "recall_at_2": "R@2", "recall_at_4": "R@4", "recall_at_8": "R@8"}
METRIC_COLUMNS |= {"map_at_r": "MAP@R", "r_precision": "R-Precision"}

TABLE_HEADS = ("config", "metric", "seeds", "mean", "sd", "95 % interval", "gain", "95 % interval of the gain", "p")
QUERY_HEADS = (
    *("config", "metric", "queries", "won", "lost", "equal"),
    *("gain", "95 % over classes", "p, classes", "p, seeds", "differs"),
)
CLASS_HEADS = ("class", "queries", "R@1 won", "lost", "equal", "R@1 gain", "MAP@R gain")

QUERY_METRICS = ("test/recall_at_1", "test/map_at_r")  # that a query has a score of

Interval = tuple[float, float]


class Line(NamedTuple):
    """One config in one metric, over its seeds.

    Attributes:
        group: The config's label.
        metric: The metric's name, such as test/map_at_r.
        values: The metric's value of each seed.
        mean: Mean of the values.
        sd: Standard deviation of the sample; None for a single seed.
        interval: 95 % interval of the mean; None for a single seed.
        shared: How many seeds the baseline has, too.
        gain: Mean over the shared seeds of this config's value less the baseline's; None for the baseline itself and
            where no seed is shared.
        gain_interval: 95 % interval of the gain.
        p: Two-sided p-value of no difference, adjusted for the number of comparisons.
    """

    group: str
    metric: str
    values: dict[str, float]
    mean: float
    sd: float | None
    interval: Interval | None
    shared: int = 0
    gain: float | None = None
    gain_interval: Interval | None = None
    p: float | None = None


class QueryLine(NamedTuple):
    """One config against the baseline in one metric, query by query.

    Attributes:
        group: The config's label.
        metric: The metric's name, such as test/map_at_r.
        seeds: How many runs are paired with a run of the baseline.
        classes: How many classes the queries are of.
        queries: How many queries have a match.
        won: How many of them the config does better on than the baseline, in the mean over the pairs of runs.
        lost: How many it does worse on.
        gain: Mean over the queries and pairs of the config's score less the baseline's.
        interval: 95 % interval of the gain over classes; None where too few classes differ to tell.
        p_classes: Two-sided p-value of no difference on other classes, adjusted for the number of comparisons; None
            for a single class.
        p_seeds: The same of no difference with other seeds; None for a single pair.
        differs: Whether no test that there is takes the difference for luck, at 5 %.
    """

    group: str
    metric: str
    seeds: int
    classes: int
    queries: int
    won: int
    lost: int
    gain: float
    interval: Interval | None
    p_classes: float | None
    p_seeds: float | None
    differs: bool


class ClassGain(NamedTuple):
    """One class in one metric: what QueryLine says of all queries, of those of the class."""

    group: str
    metric: str
    label: str
    queries: int
    won: int
    lost: int
    gain: float


def short_number(value: str) -> str:
    """Write a fraction in four digits, and anything else as it is."""
    try:
        return f"{float(value):.4g}" if not value.isdigit() else value
    except ValueError:
        return value


def format_line(line: Line) -> tuple[str, ...]:
    """Write a line as the texts of a table's row, under TABLE_HEADS; numbers in percent."""
    return (
        line.group,
        line.metric,
        str(len(line.values)),
        _percent(line.mean),
        _percent(line.sd),
        _percent_range(line.interval),
        _percent(line.gain, "+"),
        _percent_range(line.gain_interval, "+"),
        _probability(line.p),
    )


def format_query_line(line: QueryLine) -> tuple[str, ...]:
    """Write a line as the texts of a table's row, under QUERY_HEADS; numbers in percent."""
    differs = "yes" if line.differs else "no"
    return (
        line.group,
        line.metric,
        *_counts(line),
        _percent_range(line.interval, "+"),
        _probability(line.p_classes),
        _probability(line.p_seeds),
        differs if line.p_seeds is not None else f"{differs} (these two models)",
    )


def format_class(gains: Sequence[ClassGain]) -> tuple[str, ...]:
    """Write a class as the texts of a table's row, under CLASS_HEADS. gains: of each of QUERY_METRICS."""
    recall, precision = gains
    return recall.label, *_counts(recall), _percent(precision.gain, "+")


def _counts(tally: QueryLine | ClassGain) -> tuple[str, ...]:
    numbers = tally.queries, tally.won, tally.lost, tally.queries - tally.won - tally.lost
    return *(str(number) for number in numbers), _percent(tally.gain, "+")


def _percent(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{100 * value:{sign}.1f}"


def _percent_range(interval: Interval | None, sign: str = "") -> str:
    return "" if interval is None else f"{_percent(interval[0], sign)} ... {_percent(interval[1], sign)}"


def _probability(p: float | None) -> str:
    return "" if p is None else f"{p:.3f}"
