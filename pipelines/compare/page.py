"""The page of a comparison: its table, and every run as a point."""

import io
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipelines.compare import wording
from pipelines.compare.wording import TABLE_HEADS, Line
from pipelines.pages import render
from pipelines.pages.svg import SERIES, to_svg


def draw_runs(lines: Sequence[Line]) -> Figure:
    """Every run as a point, and below them the mean and its interval; a panel for each metric."""
    metrics = [*dict.fromkeys(line.metric for line in lines)]
    groups = [*dict.fromkeys(line.group for line in lines)]
    names = [textwrap.fill(group, 44) for group in groups]
    height = max(0.45, 0.2 * max(name.count("\n") + 1 for name in names))  # inches of one
    made = Figure(figsize=(5 * len(metrics), 1 + height * len(groups)), layout="constrained")
    for axis, metric in zip(made.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for line in (line for line in lines if line.metric == metric):
            height = len(groups) - groups.index(line.group)
            axis.plot([100 * v for v in line.values.values()], [height] * len(line.values), "o", alpha=0.5, ms=5)
            if line.interval:
                axis.plot([100 * end for end in line.interval], [height - 0.2] * 2, "-", color="black", lw=1)
            axis.plot([100 * line.mean], [height - 0.2], "|", color="black", ms=10)
        axis.set(title=metric, xlabel="%", yticks=[len(groups) - i for i in range(len(groups))], ylim=(0.4, None))
        axis.set_yticklabels(names if axis is made.axes[0] else [])
        axis.grid(axis="x", alpha=0.3)
    return made


def page(title: str, lines: Sequence[Line], baseline: str, warnings: Sequence[str]) -> str:
    """One HTML page without anything from elsewhere: the table, and every run as a point."""
    import base64
    import html

    drawn = io.StringIO()
    draw_runs(lines).savefig(drawn, format="svg", metadata={"Date": None})
    picture = base64.b64encode(drawn.getvalue().encode()).decode()
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in wording.cells(line)) + "</tr>" for line in lines
    )
    heads = "".join(f"<th scope='col'>{html.escape(head)}</th>" for head in TABLE_HEADS)
    told = "".join(f"<li>{html.escape(warning)}</li>" for warning in warnings)
    style = (
        "body{font:16px/1.5 system-ui;margin:2em auto;max-width:75em;padding:0 1em}"
        "table{border-collapse:collapse;display:block;overflow-x:auto}"
        "td,th{padding:.3em .8em;text-align:left;border-bottom:1px solid #8888}"
        "img{max-width:100%;background:white}:root{color-scheme:light dark}"
    )
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{style}</style><h1>{html.escape(title)}</h1>"
        f"<p>Baseline: {html.escape(baseline)}. Means over seeds in percent with 95 % bootstrap intervals; gains are "
        f"paired by seed; p by permutation of signs, Holm-adjusted.</p><ul>{told}</ul>"
        f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
        f"<img alt='Every run as a point, mean and interval below' src='data:image/svg+xml;base64,{picture}'></html>"
    )


class Compared(NamedTuple):
    """The content of `dml compare`'s page."""

    baseline: str
    warnings: Sequence[str]
    lines: Sequence[Line]

    def shown(self) -> dict[str, Any]:
        rows = [wording.cells(line) for line in self.lines]
        return {"heads": TABLE_HEADS, "rows": rows, "drawing": draw_comparison(self.lines), **self._asdict()}


def render_comparison(title: str, compared: Compared, made: str) -> str:
    head = {"compared": "Whether a gain is real"}
    lead = f"{len({line.group for line in compared.lines})} configs"
    return render.render("comparison.html", title=title, lead=lead, sections=head, compared=compared.shown(), made=made)


def draw_comparison(lines: Sequence[Line]) -> Markup:
    figure = draw_runs(lines)
    for line in figure.findobj(Line2D):
        if line.get_marker() == "o":  # type: ignore[attr-defined]
            line.set(color=SERIES[0], alpha=0.8)
    told = (f"{line.group}, {line.metric}: {100 * line.mean:.1f} % of {len(line.values)} seeds" for line in lines)
    return to_svg(figure, "Means: " + "; ".join(told))
