"""The lines of a comparison as text, and the names of metrics and rankings in tables."""

from typing import NamedTuple

# Prefixes of test metrics, and what is measured in each way.
RANKINGS = {"features": "raw features", "untrained": "untrained", "test": "trained"}
RANKINGS |= {"test_rerank": "trained, re-ranked", "test_exact": "trained, exact"}

METRIC_COLUMNS = {"recall_at_1": "R@1", "recall_at_2": "R@2", "recall_at_4": "R@4", "recall_at_8": "R@8"}
METRIC_COLUMNS |= {"map_at_r": "MAP@R", "r_precision": "R-Precision"}


Interval = tuple[float, float]


class Line(NamedTuple):
    """One group in one metric. sd: of the sample.  gain: the mean over the seeds shared with the baseline of what the
    group has more; its 95 % interval, and p, adjusted for the number of comparisons. None where there is none."""

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
    """A fraction in four digits; anything else as it is."""
    try:
        return f"{float(value):.4g}" if not value.isdigit() else value
    except ValueError:
        return value


TABLE_HEADS = ("config", "metric", "seeds", "mean", "sd", "95 % interval", "gain", "95 % interval of the gain", "p")


def cells(line: Line) -> tuple[str, ...]:
    """A line as text, in percent."""

    def number(value: float | None, sign: str = "") -> str:
        return "" if value is None else f"{100 * value:{sign}.1f}"

    def both(ends: Interval | None, sign: str = "") -> str:
        return "" if ends is None else f"{number(ends[0], sign)} ... {number(ends[1], sign)}"

    return (
        *(line.group, line.metric, str(len(line.values)), number(line.mean), number(line.sd), both(line.interval)),
        *(number(line.gain, "+"), both(line.gain_interval, "+"), "" if line.p is None else f"{line.p:.3f}"),
    )
