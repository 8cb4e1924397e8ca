"""A report as one HTML page without anything from elsewhere: what is known, into the templates of pages/."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.compare.page import comparison_content
from pipelines.compare.statistics import Comparison
from pipelines.compare.wording import METRIC_COLUMNS, RANKINGS, short_number
from pipelines.config import schema
from pipelines.config.schema import Config
from pipelines.pages import render
from pipelines.reports.inspection import Inspection
from pipelines.reports.plots import draw_cloud, draw_curves, draw_spectrum, draw_spread
from pipelines.sweeps.plots import FEWEST_SCORES, draw_all_settings, draw_figures, draw_slices
from pipelines.sweeps.records import Trial
from pipelines.sweeps.spaces import Space

RUN = {
    "retrieval": "Retrieval",
    "curves": "Training",
    "neighbours": "Nearest neighbours",
    "errors": "Hardest errors",
    "map": "Map of the embedding",
    "variation": "Variation inside classes",
    "settings": "Config and environment",
}

SWEEP = {"tested": "Winner against defaults", "settings": "Settings", "trials": "Trials", "sweep": "The sweep"}

DRAWN = {
    "parallel_coordinates": "Each trial as a line through its score and settings, the stronger the better",
    "importance": "Importance of each setting for the score (fANOVA)",
    "changes": "Settings that changed on the way, a line for each trial, the stronger the better it ended",
}


def render_run(
    title: str,
    config: Config,
    found: Inspection,
    history: Sequence[dict[str, Any]],
    best: int,
    whence: str,
    environment: dict[str, str],
    footer: str,
) -> str:
    """history: records of epochs.  whence: of the numbers.  environment: name -> value."""
    measured = {prefix: way for prefix, way in RANKINGS.items() if f"{prefix}/map_at_r" in found.numbers}
    rows = [
        (way, *(f"{100 * found.numbers[f'{prefix}/{key}']:.1f}" for key in METRIC_COLUMNS))
        for prefix, way in measured.items()
    ]
    all_pictures = found.looked_at == found.of
    part = f"all {found.of:,}" if all_pictures else f"{found.looked_at:,}, of whole classes, of the {found.of:,}"
    easier = "" if all_pictures else " Among fewer pictures there are fewer to be confused with."
    last = history[-1]["step"] if history else 0
    return render.render(
        "run.html",
        title=title,
        lead=f"{config.data.name}: {' + '.join(config.method).upper() or 'no method'} over {config.loss.name}, "
        f"backbone {config.backbone.name}, {config.embedding_dim} dimensions, seed {config.seed}",
        sections=RUN,
        whence=whence,
        numbers=(["embedding", *METRIC_COLUMNS.values()], rows),
        of_history=f"Epochs 1 to {last} of {config.epochs}; train/* are means over an epoch's steps.",
        best=best,
        curves=draw_curves(history, best).values(),
        looked_at=f"Among {part} test pictures.{easier}",
        found=found,
        drawings=[draw_spread(found.variation), draw_spectrum(found.variation)],
        spreads=[
            (name, f"{own:.3f}", f"{other:.3f}", f"{own / other:.2f}", f"{v.rank:.1f}")
            for name, v in found.variation.items()
            for own, other in [(np.median(v.own), np.median(v.other))]
        ],
        clouds=[(draw_cloud(cloud), cloud) for cloud in found.clouds],
        unseen="" if found.clouds else "No method in use draws synthetic embeddings in this epoch.",
        environment=environment.items(),
        config=config.flat().items(),
        footer=footer,
    )


def render_sweep(
    title: str, trials: Sequence[Trial], space: Space, comparison: Comparison, about: dict[str, str], footer: str
) -> str:
    """about: name -> value."""
    figures = draw_figures(space, trials)
    ranked = sorted(trials, key=lambda trial: (trial.score is None, -(trial.score or 0.0)))
    keys = [*dict.fromkeys(key for trial in ranked for key in schema.flatten(trial.point))]
    best = ranked[0]

    def row(trial: Trial) -> tuple[str, ...]:
        settings, score = schema.flatten(trial.point), "" if trial.score is None else f"{trial.score:.4f}"
        values = (short_number(str(settings[key])) if key in settings else "" for key in keys)
        ended = f"{trial.ended}: {trial.reason}" if trial.reason else trial.ended
        return trial.name, score, str(trial.epochs), *values, ended

    return render.render(
        "sweep.html",
        title=title,
        lead=f"{len(trials)} trials; the best, {best.name}, has val/map_at_r {best.score:.4f} on validation classes",
        sections=SWEEP,
        compared=comparison_content(comparison),
        drawings=[(draw_all_settings(figures[name], told), told) for name, told in DRAWN.items() if name in figures],
        slices=[] if "changes" in figures else draw_slices(space, trials),
        important="importance" in figures or "changes" in figures,
        fewest=FEWEST_SCORES,
        heads=("trial", "val/map_at_r", "epochs", *keys, "ended"),
        rows=[row(trial) for trial in ranked],
        about=about.items(),
        footer=footer,
    )
