"""A report as one HTML page without anything from elsewhere: what is known, into the templates of pages/."""

from collections.abc import Mapping, Sequence

import numpy as np

from pipelines.compare.page import comparison_content
from pipelines.compare.statistics import Comparison
from pipelines.compare.wording import METRIC_COLUMNS, RANKINGS, short_number
from pipelines.config import schema
from pipelines.config.schema import Config
from pipelines.pages.render import render
from pipelines.reports.inspection import Inspection
from pipelines.reports.plots import draw_cloud, draw_curves, draw_spectrum, draw_spread
from pipelines.sweeps.plots import FEWEST_SCORES, draw_figures, draw_slices, restyle_figure
from pipelines.sweeps.records import Trial
from pipelines.sweeps.spaces import Space
from pipelines.tracking.records import EpochRecord

RUN_SECTIONS = {
    "retrieval": "Retrieval",
    "curves": "Training",
    "neighbours": "Nearest neighbours",
    "errors": "Hardest errors",
    "map": "Map of the embedding",
    "variation": "Variation inside classes",
    "settings": "Config and environment",
}

SWEEP_SECTIONS = {"tested": "Winner against defaults", "settings": "Settings", "trials": "Trials", "sweep": "The sweep"}

# Of the figures of all settings together.
CAPTIONS = {
    "parallel_coordinates": "Each trial as a line through its score and settings, the stronger the better",
    "importance": "Importance of each setting for the score (fANOVA)",
    "changes": "Settings that changed on the way, a line for each trial, the stronger the better it ended",
}


def render_run(
    title: str,
    config: Config,
    inspection: Inspection,
    history: Sequence[EpochRecord],
    best_epoch: int,
    source: str,
    environment: Mapping[str, str],
    footer: str,
) -> str:
    """Render the page of a run.

    Args:
        title: Its heading.
        config: What the run was trained by.
        inspection: What its model does with the test pictures.
        history: A record for each epoch.
        best_epoch: The epoch of the model, from 1.
        source: Where the metrics of the inspection come from, as half a sentence.
        environment: What the run was trained with and the page made with, by name.
        footer: Its last line; see pages.render.made_by.
    """
    metrics = inspection.metrics
    retrieval_rows = [
        (ranking, *(f"{100 * metrics[f'{prefix}/{key}']:.1f}" for key in METRIC_COLUMNS))
        for prefix, ranking in RANKINGS.items()
        if f"{prefix}/map_at_r" in metrics
    ]
    medians = {
        name: (np.median(v.to_own_center), np.median(v.to_next_center)) for name, v in inspection.variation.items()
    }
    return render(
        "run.html",
        title=title,
        lead=f"{config.data.name}: {' + '.join(config.method).upper() or 'no method'} over {config.loss.name}, "
        f"backbone {config.backbone.name}, {config.embedding_dim} dimensions, seed {config.seed}",
        sections=RUN_SECTIONS,
        source=source,
        retrieval_heads=["embedding", *METRIC_COLUMNS.values()],
        retrieval_rows=retrieval_rows,
        epochs_trained=history[-1]["step"] if history else 0,
        epochs=config.epochs,
        best_epoch=best_epoch,
        curves=draw_curves(history, best_epoch).values(),
        inspection=inspection,
        variation_figures=[draw_spread(inspection.variation), draw_spectrum(inspection.variation)],
        variation_rows=[
            (name, f"{to_own:.3f}", f"{to_next:.3f}", f"{to_own / to_next:.2f}", f"{v.effective_rank:.1f}")
            for (name, v), (to_own, to_next) in zip(inspection.variation.items(), medians.values())
        ],
        clouds=[(draw_cloud(cloud), cloud) for cloud in inspection.clouds],
        environment=environment.items(),
        config=config.flat().items(),
        footer=footer,
    )


def render_sweep(
    title: str,
    trials: Sequence[Trial],
    space: Space,
    comparison: Comparison,
    facts: Mapping[str, str],
    footer: str,
) -> str:
    """Render the page of a sweep.

    Args:
        title: Its heading.
        trials: All trials of the search.
        space: What was searched.
        comparison: The winner's tests against those of the defaults.
        facts: What the sweep was, by name.
        footer: Its last line; see pages.render.made_by.
    """
    figures = draw_figures(space, trials)
    ranked = sorted(trials, key=lambda trial: (trial.score is None, -(trial.score or 0.0)))
    keys = [*dict.fromkeys(key for trial in ranked for key in schema.flatten(trial.point))]
    best = ranked[0]

    def row(trial: Trial) -> tuple[str, ...]:
        settings, score = schema.flatten(trial.point), "" if trial.score is None else f"{trial.score:.4f}"
        values = (short_number(str(settings[key])) if key in settings else "" for key in keys)
        ended = f"{trial.ended}: {trial.reason}" if trial.reason else trial.ended
        return trial.name, score, str(trial.epochs), *values, ended

    return render(
        "sweep.html",
        title=title,
        lead=f"{len(trials)} trials; the best, {best.name}, has val/map_at_r {best.score:.4f} on validation classes",
        sections=SWEEP_SECTIONS,
        comparison=comparison_content(comparison),
        figures=[(restyle_figure(figures[key], text), text) for key, text in CAPTIONS.items() if key in figures],
        slices=[] if "changes" in figures else draw_slices(space, trials),
        has_importance="importance" in figures or "changes" in figures,
        fewest_scores=FEWEST_SCORES,
        heads=("trial", "val/map_at_r", "epochs", *keys, "ended"),
        rows=[row(trial) for trial in ranked],
        facts=facts.items(),
        footer=footer,
    )
