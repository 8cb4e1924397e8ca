"""Figures of a report: drawn by matplotlib, coloured by the page's CSS, so that they are light or dark as it is."""

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle, StepPatch
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullLocator
from ray.tune.search.sample import Categorical, LogUniform

from pipelines import compare
from pipelines.scatter import Cloud, Variation
from pipelines.spaces import Space
from pipelines.tuner import Trial

# Colours that stand for CSS variables of the page.
INK, MUTED, LINE = "#010101", "#020202", "#030303"
SERIES = ("#040404", "#050505", "#060606")
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", "#000000": "ink"} | dict(zip(SERIES, ("one", "two", "three")))
DASHES, MARKERS = ("-", "--", ":"), ("o", "^", "s")
STYLE: Any = {"font.size": 8, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"svg.fonttype": "none", "lines.linewidth": 1.6, "legend.frameon": False}
SMALL = (3.3, 2.3)  # inches


@rc_context(STYLE)
def drawing(figure: Figure, alt: str) -> Markup:
    """SVG for the page, in its colours, with a text for those who do not see it."""
    figure.patch.set_visible(False)
    for axis in figure.axes:
        axis.set_facecolor("none")
        axis.tick_params(which="both", color=LINE, labelcolor=MUTED)
        edges: list[Any] = [*axis.spines.values(), *axis.get_xgridlines(), *axis.get_ygridlines()]
        for edge in edges:
            edge.set_color(LINE)
    texts: list[Any] = figure.findobj(Text)
    for text in texts:
        text.set_color(INK if text.get_color() in (INK, "black") else MUTED)
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.hashsalt": alt}):  # ids of its own, and the same at every call
        figure.savefig(file, format="svg", metadata=nothing, bbox_inches="tight", pad_inches=0.04)
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
def panel(title: str = "", **settings: Any) -> tuple[Figure, Any]:
    figure = Figure(SMALL, layout="constrained")
    axis = figure.subplots()
    axis.set(title=title, **settings)
    axis.title.set(color=INK, parse_math=False)
    return figure, axis


@rc_context(STYLE)
def curves(history: Sequence[dict[str, Any]], best: int) -> dict[str, Markup]:
    """name -> a figure of one metric by epochs; of a metric of validation a line for each way of retrieving. Terms that
    are zero all along, of methods not in use, are left out."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for record in history:
        for key, value in record["metrics"].items():
            prefix, _, name = key.partition("/")
            title = key if prefix == "train" else f"val/{name}"
            found.setdefault(title, {}).setdefault(prefix, []).append((record["step"], value))
    drawn = {}
    for title, lines in found.items():
        if title.endswith("queries_without_match") or not any(value for line in lines.values() for _, value in line):
            continue
        figure, axis = panel(title, xlabel="epoch")
        told = []
        for (prefix, line), colour, dash, marker in zip(lines.items(), SERIES, DASHES, MARKERS):
            label = prefix.replace("val_", "").replace("val", "plain")
            few = {"marker": marker, "ms": 3.5} if len(line) <= 20 else {}
            axis.plot(*zip(*line), dash, color=colour, label=label, **few)
            told.append(f"{label if len(lines) > 1 else title} from {line[0][1]:.4g} to {line[-1][1]:.4g}")
        if title.startswith("val/"):
            axis.axvline(best, color=MUTED, lw=1, ls=(0, (2, 2)))
        if len(lines) > 1:
            axis.legend()
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(axis="y", lw=0.6)
        steps = f"epochs {history[0]['step']} to {history[-1]['step']}"
        drawn[title] = drawing(figure, f"{title} over {steps}: {'; '.join(told)}")
    return drawn


@rc_context(STYLE)
def spread(found: dict[str, Variation]) -> Markup:
    """Each class as a point: how far its pictures are from its centre, and how far the next centre is."""
    figure, axis = panel("Spread of each class", xlabel="to the nearest other centre", ylabel="to its own centre")
    for (name, v), colour, marker in zip(found.items(), (SERIES[1], SERIES[0]), MARKERS[1::-1]):
        axis.plot(v.other, v.own, marker, color=colour, ms=3.5, alpha=0.7, label=name, mew=0)
    end = max(axis.get_xlim()[1], axis.get_ylim()[1])
    axis.plot([0, end], [0, end], color=MUTED, lw=1, ls=(0, (2, 2)))
    axis.set(xlim=(0, end), ylim=(0, end))
    axis.legend()
    medians = {name: (np.median(v.own), np.median(v.other)) for name, v in found.items() if len(v.own)}
    told = "; ".join(f"{n}: medians {own:.3f} to its own and {o:.3f} to the next" for n, (own, o) in medians.items())
    return drawing(figure, f"Mean distance to the class's own centre against the nearest other centre. {told}")


@rc_context(STYLE)
def spectrum(found: dict[str, Variation]) -> Markup:
    figure, axis = panel("Spectrum of the embeddings", xlabel="singular value, by size", ylabel="share of their sum")
    for (name, v), colour, dash in zip(found.items(), (SERIES[1], SERIES[0]), DASHES[1::-1]):
        positive = v.spectrum[v.spectrum > 1e-6]
        axis.plot(np.arange(1, len(positive) + 1), positive, dash, color=colour, label=name)
    axis.set_yscale("log")
    axis.legend()
    axis.grid(axis="y", lw=0.6)
    told = ", ".join(f"effective rank {v.rank:.1f} {name}" for name, v in found.items())
    return drawing(figure, f"Singular values of the embeddings, sorted: {told}")


def compared(lines: Sequence[compare.Line]) -> Markup:
    figure = compare.figure(lines)
    for line in figure.findobj(Line2D):
        if line.get_marker() == "o":  # type: ignore[attr-defined]
            line.set(color=SERIES[0], alpha=0.8)
    told = (f"{line.group}, {line.metric}: {100 * line.mean:.1f} % of {len(line.values)} seeds" for line in lines)
    return drawing(figure, "Means: " + "; ".join(told))


def of_all_settings(figure: Figure, alt: str) -> Markup:
    """A figure of sweep_plots. A trial's line is the stronger, the better it ended; bars are of one colour."""
    for lines in figure.findobj(LineCollection):
        scores = lines.get_array()  # type: ignore[attr-defined]
        if scores is not None:
            share = (scores - scores.min()) / max(np.ptp(scores), 1e-9)
            lines.set(
                array=None, color=[to_rgba(SERIES[0], 0.12 + 0.88 * s**2) for s in share], linewidth=1 + 1.5 * share
            )
    for axis in figure.axes[:]:
        if axis.get_label() == "<colorbar>":
            axis.remove()
            continue
        bars = [patch for patch in axis.patches if isinstance(patch, Rectangle)]
        if bars:
            names = [label.get_text() for label in axis.get_yticklabels()]
            alt += ": " + ", ".join(f"{name} {bar.get_width():.2f}" for name, bar in zip(names, bars))
        for bar in bars:
            bar.set_color(SERIES[0])
        steps = [patch for patch in axis.patches if isinstance(patch, StepPatch)]  # the best is drawn last
        for place, step in enumerate(steps, 1):
            step.set_edgecolor(to_rgba(SERIES[0], 0.12 + 0.88 * (place / len(steps)) ** 2))
        if not steps:  # whose title is the setting
            axis.set_title("")
            axis.set_title("", loc="left")
        if legend := axis.get_legend():
            legend.remove()
    for text in figure.findobj(Text):
        text.set_fontsize(9)  # type: ignore[attr-defined]
    return drawing(figure, alt)


@rc_context(STYLE)
def slices(space: Space, trials: Sequence[Trial]) -> list[Markup]:
    """Each setting against the score, of trials that came to their end."""
    ended = [trial for trial in trials if trial.ended == "finished"]
    scores, drawn = [trial.score for trial in ended], []
    for key, domain in space.items():
        values = [trial.point[key] for trial in ended]
        figure, axis = panel(key, ylabel="val/map_at_r")
        if isinstance(domain, Categorical):
            values = [*map(str, values)]
        elif isinstance(domain.get_sampler(), LogUniform):
            axis.set_xscale("log")
            axis.xaxis.set(
                major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator()
            )
        axis.plot(values, scores, "o", color=SERIES[0], ms=4.5, alpha=0.8, mew=0)
        axis.grid(axis="y", lw=0.6)
        best = max(range(len(ended)), key=lambda i: scores[i] or 0.0)
        axis.plot(values[best], scores[best], "D", color=SERIES[1], ms=6)
        told = f"{key} against val/map_at_r of {len(ended)} trials, the best {scores[best]:.4f} at {values[best]}"
        drawn.append(drawing(figure, told))
    return drawn


@rc_context(STYLE)
def cloud(found: Cloud) -> Markup:
    """The stronger a synthetic, the paler."""
    figure, axis = panel(f"{found.method} around {found.label}"[:44])
    figure.set_size_inches(3.3, 3.0)
    for number, drawn in enumerate(found.synthetic[::-1]):
        alpha = 0.25 + 0.6 * (number + 1) / len(found.synthetic)
        label = "synthetic" if number + 1 == len(found.synthetic) else None
        axis.plot(*drawn.T, "x", color=SERIES[1], ms=3, mew=0.8, alpha=alpha, label=label)
    axis.plot(*found.real.T, "o", color=SERIES[0], ms=4.5, label="picture")
    axis.set_aspect("equal", adjustable="datalim")
    axis.set(xlabel="first principal axis", ylabel="second")
    axis.legend()
    size = sum(map(len, found.synthetic))
    return drawing(figure, f"{len(found.real)} pictures of {found.label} and {size} synthetics of {found.method}")
