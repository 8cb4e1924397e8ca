"""Figures of a report: drawn by matplotlib, coloured by the page's CSS, so that they are light or dark as it is."""

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context

from pipelines.pages.svg import DASHES, MARKERS, MUTED, SERIES, STYLE, new_panel, to_svg
from pipelines.reports.geometry import Cloud, Variation
from pipelines.tracking.records import EpochRecord

DASHED = (0, (2, 2))

FEW_EPOCHS = 20  # up to which each epoch has a marker


@rc_context(STYLE)
def draw_curves(history: Sequence[EpochRecord], best_epoch: int) -> dict[str, Markup]:
    """Draw each metric by epochs; a metric of validation has a line for each way of retrieving.

    Terms that are zero all along, of methods not in use, are left out.

    Returns:
        Figures by the metric's name.
    """
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}  # title -> prefix -> (epoch, value)
    for record in history:
        for key, value in record["metrics"].items():
            prefix, _, name = key.partition("/")
            title = key if prefix == "train" else f"val/{name}"
            curves.setdefault(title, {}).setdefault(prefix, []).append((record["step"], value))
    figures = {}
    for title, lines in curves.items():
        if title.endswith("queries_without_match") or not any(value for line in lines.values() for _, value in line):
            continue
        figure, axis = new_panel(title, xlabel="epoch")
        ends = []
        for (prefix, line), colour, dash, marker in zip(lines.items(), SERIES, DASHES, MARKERS):
            label = prefix.replace("val_", "").replace("val", "plain")
            marker = marker if len(line) <= FEW_EPOCHS else ""
            axis.plot(*zip(*line), linestyle=dash, color=colour, label=label, marker=marker, ms=3.5)
            ends.append(f"{label if len(lines) > 1 else title} from {line[0][1]:.4g} to {line[-1][1]:.4g}")
        if title.startswith("val/"):
            axis.axvline(best_epoch, color=MUTED, lw=1, ls=DASHED)
        if len(lines) > 1:
            axis.legend()
        axis.locator_params(axis="x", integer=True)
        axis.grid(axis="y", lw=0.6)
        epochs = f"epochs {history[0]['step']} to {history[-1]['step']}"
        figures[title] = to_svg(figure, f"{title} over {epochs}: {'; '.join(ends)}")
    return figures


@rc_context(STYLE)
def draw_spread(variations: Mapping[str, Variation]) -> Markup:
    """Draw each class as a point: how far its pictures are from its centre, and how far the next centre is.

    variations: of the untrained and of the trained network.
    """
    figure, axis = new_panel("Spread of each class", xlabel="to the nearest other centre", ylabel="to its own centre")
    for (name, v), colour, marker in zip(variations.items(), (SERIES[1], SERIES[0]), MARKERS[1::-1]):
        axis.plot(v.to_next_center, v.to_own_center, marker, color=colour, ms=3.5, alpha=0.7, label=name, mew=0)
    end = max(axis.get_xlim()[1], axis.get_ylim()[1])
    axis.plot([0, end], [0, end], color=MUTED, lw=1, ls=DASHED)
    axis.set(xlim=(0, end), ylim=(0, end))
    axis.legend()
    medians = "; ".join(
        f"{name}: medians {np.median(v.to_own_center):.3f} to its own and {np.median(v.to_next_center):.3f} to the next"
        for name, v in variations.items()
        if len(v.to_own_center)
    )
    return to_svg(figure, f"Mean distance to the class's own centre against the nearest other centre. {medians}")


@rc_context(STYLE)
def draw_spectrum(variations: Mapping[str, Variation]) -> Markup:
    """Draw the singular values of the embeddings of the untrained and of the trained network, by size."""
    figure, axis = new_panel(
        "Spectrum of the embeddings", xlabel="singular value, by size", ylabel="share of their sum"
    )
    for (name, v), colour, dash in zip(variations.items(), (SERIES[1], SERIES[0]), DASHES[1::-1]):
        positive = v.spectrum[v.spectrum > 1e-6]
        axis.plot(np.arange(1, len(positive) + 1), positive, dash, color=colour, label=name)
    axis.set_yscale("log")
    axis.legend()
    axis.grid(axis="y", lw=0.6)
    ranks = ", ".join(f"effective rank {v.effective_rank:.1f} {name}" for name, v in variations.items())
    return to_svg(figure, f"Singular values of the embeddings, sorted: {ranks}")


@rc_context(STYLE)
def draw_cloud(cloud: Cloud) -> Markup:
    """Draw embeddings of a class and their synthetics; the stronger a synthetic, the paler."""
    figure, axis = new_panel(f"{cloud.method} around {cloud.label}"[:44])
    figure.set_size_inches(3.3, 3.0)
    for number, synthetics in enumerate(cloud.synthetics[::-1], 1):
        alpha = 0.25 + 0.6 * number / len(cloud.synthetics)
        label = "synthetic" if number == len(cloud.synthetics) else None
        axis.plot(*synthetics.T, "x", color=SERIES[1], ms=3, mew=0.8, alpha=alpha, label=label)
    axis.plot(*cloud.embeddings.T, "o", color=SERIES[0], ms=4.5, label="picture")
    axis.set_aspect("equal", adjustable="datalim")
    axis.set(xlabel="first principal axis", ylabel="second")
    axis.legend()
    size = sum(map(len, cloud.synthetics))
    return to_svg(figure, f"{len(cloud.embeddings)} pictures of {cloud.label} and {size} synthetics of {cloud.method}")
