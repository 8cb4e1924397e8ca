"""Figures of a report: drawn by matplotlib, coloured by the page's CSS, so that they are light or dark as it is."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context

from pipelines.pages import svg
from pipelines.pages.svg import DASHES, MARKERS, MUTED, SERIES, STYLE, to_svg
from pipelines.reports.geometry import Cloud, Variation

STYLE |= {"svg.fonttype": "none", "lines.linewidth": 1.6, "legend.frameon": False}


@rc_context(STYLE)
def draw_curves(history: Sequence[dict[str, Any]], best: int) -> dict[str, Markup]:
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
        figure, axis = svg.panel(title, xlabel="epoch")
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
        drawn[title] = to_svg(figure, f"{title} over {steps}: {'; '.join(told)}")
    return drawn


@rc_context(STYLE)
def draw_spread(found: dict[str, Variation]) -> Markup:
    """Each class as a point: how far its pictures are from its centre, and how far the next centre is."""
    figure, axis = svg.panel("Spread of each class", xlabel="to the nearest other centre", ylabel="to its own centre")
    for (name, v), colour, marker in zip(found.items(), (SERIES[1], SERIES[0]), MARKERS[1::-1]):
        axis.plot(v.other, v.own, marker, color=colour, ms=3.5, alpha=0.7, label=name, mew=0)
    end = max(axis.get_xlim()[1], axis.get_ylim()[1])
    axis.plot([0, end], [0, end], color=MUTED, lw=1, ls=(0, (2, 2)))
    axis.set(xlim=(0, end), ylim=(0, end))
    axis.legend()
    medians = {name: (np.median(v.own), np.median(v.other)) for name, v in found.items() if len(v.own)}
    told = "; ".join(f"{n}: medians {own:.3f} to its own and {o:.3f} to the next" for n, (own, o) in medians.items())
    return to_svg(figure, f"Mean distance to the class's own centre against the nearest other centre. {told}")


@rc_context(STYLE)
def draw_spectrum(found: dict[str, Variation]) -> Markup:
    figure, axis = svg.panel(
        "Spectrum of the embeddings", xlabel="singular value, by size", ylabel="share of their sum"
    )
    for (name, v), colour, dash in zip(found.items(), (SERIES[1], SERIES[0]), DASHES[1::-1]):
        positive = v.spectrum[v.spectrum > 1e-6]
        axis.plot(np.arange(1, len(positive) + 1), positive, dash, color=colour, label=name)
    axis.set_yscale("log")
    axis.legend()
    axis.grid(axis="y", lw=0.6)
    told = ", ".join(f"effective rank {v.rank:.1f} {name}" for name, v in found.items())
    return to_svg(figure, f"Singular values of the embeddings, sorted: {told}")


@rc_context(STYLE)
def draw_cloud(found: Cloud) -> Markup:
    """The stronger a synthetic, the paler."""
    figure, axis = svg.panel(f"{found.method} around {found.label}"[:44])
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
    return to_svg(figure, f"{len(found.real)} pictures of {found.label} and {size} synthetics of {found.method}")
