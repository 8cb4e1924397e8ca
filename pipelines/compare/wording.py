"""The lines of a comparison as text, and the names of metrics and rankings in tables."""

from typing import NamedTuple

# Prefixes of test metrics, and what is measured in each way.
RANKINGS = {"features": "raw features", "untrained": "untrained", "test": "trained"}
RANKINGS |= {"test_rerank": "trained, re-ranked", "test_exact": "trained, exact"}

METRIC_COLUMNS = {"recall_at_1": "R@1", "recall_at_2": "R@2", "recall_at_4": "R@4", "recall_at_8": "R@8"}
METRIC_COLUMNS |= {"map_at_r": "MAP@R", "r_precision": "R-Precision"}

TABLE_HEADS = ("config", "metric", "seeds", "mean", "sd", "95 % interval", "gain", "95 % interval of the gain", "p")


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


def short_number(value: str) -> str:
    """Write a fraction in four digits, and anything else as it is."""
    try:
        return f"{float(value):.4g}" if not value.isdigit() else value
    except ValueError:
        return value


def format_line(line: Line) -> tuple[str, ...]:
    """Write a line as the texts of a table's row, under TABLE_HEADS; numbers in percent."""

    def percent(value: float | None, sign: str = "") -> str:
        return "" if value is None else f"{100 * value:{sign}.1f}"

    def percent_range(interval: Interval | None, sign: str = "") -> str:
        return "" if interval is None else f"{percent(interval[0], sign)} ... {percent(interval[1], sign)}"

    return (
        line.group,
        line.metric,
        str(len(line.values)),
        percent(line.mean),
        percent(line.sd),
        percent_range(line.interval),
        percent(line.gain, "+"),
        percent_range(line.gain_interval, "+"),
        "" if line.p is None else f"{line.p:.3f}",
    )
