"""The page of a comparison: its table, and every run as a point."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup
from matplotlib.figure import Figure

from pipelines.compare.statistics import Comparison
from pipelines.compare.wording import TABLE_HEADS, Line, format_line
from pipelines.pages.render import render
from pipelines.pages.svg import SERIES, to_svg

SECTIONS = {"comparison": "Whether a gain is real"}


class ComparisonContent(NamedTuple):
    """A comparison as the macro `comparison` of pages/parts.html shows it."""

    baseline: str
    warnings: Sequence[str]
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    figure: Markup


def render_comparison(title: str, comparison: Comparison, footer: str) -> str:
    """Render a comparison as one HTML page, which needs nothing from elsewhere.

    Args:
        title: The page's heading.
        comparison: What is on it.
        footer: Its last line; see pages.render.made_by.
    """
    configs = len({line.group for line in comparison.lines})
    return render(
        "comparison.html",
        title=title,
        lead=f"{configs} configs",
        sections=SECTIONS,
        comparison=comparison_content(comparison),
        footer=footer,
    )


def comparison_content(comparison: Comparison) -> ComparisonContent:
    """Make the table and the drawing of a comparison, for this page or as a section of another."""
    rows = [format_line(line) for line in comparison.lines]
    figure = draw_comparison(comparison.lines)
    return ComparisonContent(comparison.baseline, comparison.warnings, TABLE_HEADS, rows, figure)


def draw_comparison(lines: Sequence[Line]) -> Markup:
    """Draw every run as a point and, below them, the mean and its interval; a panel for each metric."""
    metrics = [*dict.fromkeys(line.metric for line in lines)]
    groups = [*dict.fromkeys(line.group for line in lines)]
    names = [textwrap.fill(group, 44) for group in groups]
    inches = max(0.45, 0.2 * max(name.count("\n") + 1 for name in names))  # height of one group
    figure = Figure(figsize=(5 * len(metrics), 1 + inches * len(groups)), layout="constrained")
    for axis, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for line in (line for line in lines if line.metric == metric):
            y = len(groups) - groups.index(line.group)
            values = [100 * value for value in line.values.values()]
            axis.plot(values, [y] * len(values), "o", color=SERIES[0], alpha=0.8, ms=5)
            if line.interval:
                axis.plot([100 * end for end in line.interval], [y - 0.2] * 2, "-", color="black", lw=1)
            axis.plot([100 * line.mean], [y - 0.2], "|", color="black", ms=10)
        axis.set(title=metric, xlabel="%", yticks=[len(groups) - i for i in range(len(groups))], ylim=(0.4, None))
        axis.set_yticklabels(names if axis is figure.axes[0] else [])
        axis.grid(axis="x", alpha=0.3)
    means = (f"{line.group}, {line.metric}: {100 * line.mean:.1f} % of {len(line.values)} seeds" for line in lines)
    return to_svg(figure, "Means: " + "; ".join(means))
