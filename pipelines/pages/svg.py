"""Figures of matplotlib as SVG, coloured by the page's CSS so that they are light or dark as it is."""

import io
import re
from html import escape
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.spines import Spine
from matplotlib.text import Text

# Colours that stand for CSS variables of the page.
INK, MUTED, LINE = "#010101", "#020202", "#030303"

SERIES = ("#040404", "#050505", "#060606")

VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", "#000000": "ink"} | dict(zip(SERIES, ("one", "two", "three")))

DASHES, MARKERS = ("-", "--", ":"), ("o", "^", "s")

STYLE: Any = {  # matplotlib types its keys one by one
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "svg.fonttype": "none",  # texts stay texts, in the page's font
}

FIGURE_SIZE = (3.3, 2.3)  # inches


@rc_context(STYLE)
def to_svg(figure: Figure, alt: str) -> Markup:
    """Write a figure as SVG in the page's colours.

    Args:
        figure: What is drawn; its colours are changed.
        alt: What it shows, for those who do not see it.

    Returns:
        An `svg` element to put into a page.
    """
    figure.patch.set_visible(False)
    for axis in figure.axes:
        axis.set_facecolor("none")
        axis.tick_params(which="both", color=LINE, labelcolor=MUTED)
        edges: list[Spine | Line2D] = [*axis.spines.values(), *axis.get_xgridlines(), *axis.get_ygridlines()]
        for edge in edges:
            edge.set_color(LINE)
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_color(INK if text.get_color() in (INK, "black") else MUTED)
    file = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.hashsalt": alt}):  # ids of its own, and the same at every call
        figure.savefig(file, format="svg", metadata=no_metadata, bbox_inches="tight", pad_inches=0.04)
    opening = re.compile(r'<svg [^>]*? width="([\d.]+)pt"[^>]*? (viewBox="[^"]*")[^>]*>')
    _, points, size, rest = opening.split(file.getvalue(), maxsplit=1)
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {spaces} {size} style="--inches:{float(points) / 72:.2f}" role="img" aria-label="{escape(alt)}">{rest}'
    svg = re.sub(r' id="[a-zA-Z]+[\w.]*_\d+"', "", svg)  # such as axes_1, that all figures have
    svg = re.sub(r"font: ([^;\"]*?)(\d[\d.]*px) [^;\"]*", r"font: \1\2 system-ui, sans-serif", svg)
    for colour, name in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return Markup(svg)


@rc_context(STYLE)
def new_panel(title: str = "", **settings: str) -> tuple[Figure, Axes]:
    """Return a small figure and its axes. settings: of Axes.set, such as xlabel."""
    figure = Figure(FIGURE_SIZE, layout="constrained")
    axis = figure.subplots()
    axis.set(title=title, **settings)
    axis.title.set(color=INK, parse_math=False)
    return figure, axis
