"""The page of a comparison: its table, and every run as a point."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from pipelines.compare.queries import SMALLEST
from pipelines.compare.statistics import Comparison
from pipelines.compare.wording import QUERY_METRICS, TABLE_HEADS, ClassGain, Line, QueryLine, format_line
from pipelines.pages.gallery import Query
from pipelines.pages.render import render
from pipelines.pages.svg import SERIES, to_svg

SECTIONS = {"comparison": "Whether a gain is real", "queries": "Query by query"}

MOST_BARS = 200  # classes drawn, of more every so many


class ComparisonContent(NamedTuple):
    """A comparison as the macro `comparison` of pages/parts.html shows it."""

    baseline: str
    warnings: Sequence[str]
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    figure: Markup


class QueriesOfConfig(NamedTuple):
    """What is shown of a config's queries.

    Attributes:
        label: The config's.
        figure: Its gains by class.
        classes: For each class that is shown a picture, as a data URL, and the cells of its row.
        queries: Queries, by the words for what they have in common.
    """

    label: str
    figure: Markup
    classes: Sequence[tuple[str, Sequence[str]]]
    queries: Mapping[str, Sequence[Query]]


class QueriesContent(NamedTuple):
    """A comparison query by query, as the macro `queries` of pages/parts.html shows it."""

    warnings: Sequence[str]
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    class_heads: Sequence[str]
    configs: Sequence[QueriesOfConfig]


def render_comparison(title: str, comparison: Comparison, footer: str, queries: QueriesContent | None = None) -> str:
    """Render a comparison as one HTML page, which needs nothing from elsewhere.

    Args:
        title: The page's heading.
        comparison: What is on it.
        footer: Its last line; see pages.render.made_by.
        queries: The same query by query, if the page has that section.
    """
    configs = len({line.group for line in comparison.lines})
    return render(
        "comparison.html",
        title=title,
        lead=f"{configs} configs",
        sections={name: head for name, head in SECTIONS.items() if queries or name != "queries"},
        comparison=comparison_content(comparison),
        queries=queries,
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


def draw_class_gains(lines: Sequence[QueryLine], classes: Sequence[ClassGain]) -> Markup:
    """Draw the gain of each class as a bar, sorted, beside the mean over all queries; a panel for each metric.

    Args:
        lines: Of one config, one for each of QUERY_METRICS.
        classes: Of the same config.
    """
    figure = Figure(figsize=(5 * len(QUERY_METRICS), 2.4), layout="constrained")
    texts = []
    for axis, line in zip(figure.subplots(1, len(QUERY_METRICS), squeeze=False)[0], lines, strict=True):
        gains = np.sort([c.gain for c in classes if c.metric == line.metric])
        better, worse = int((gains > SMALLEST).sum()), int((gains < -SMALLEST).sum())
        shown = np.unique(np.linspace(0, len(gains) - 1, min(len(gains), MOST_BARS)).round().astype(int))
        axis.bar(shown, 100 * gains[shown], width=0.8 * len(gains) / len(shown), color=SERIES[0])
        axis.axhline(0, color="black", lw=0.8)
        axis.axhline(100 * line.gain, color=SERIES[1], ls="--", lw=1.2)
        axis.set(title=line.metric, xlabel=f"{len(gains)} classes: {worse} lose, {better} gain", ylabel="gain, %")
        axis.set_xticks([])
        axis.grid(axis="y", alpha=0.3)
        texts.append(
            f"{line.metric}: {worse} of {len(gains)} classes lose, {better} gain, mean {100 * line.gain:+.1f} %"
        )
    return to_svg(figure, f"Gains of classes of {lines[0].group}: " + "; ".join(texts))
