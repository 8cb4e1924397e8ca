"""A run as one HTML page without anything from elsewhere: what is known, into the template run.html."""

from collections.abc import Mapping, Sequence

import numpy as np

from pipelines.compare.wording import METRIC_COLUMNS, RANKINGS
from pipelines.config.schema import Config
from pipelines.pages.render import render
from pipelines.reports.inspection import Inspection
from pipelines.reports.plots import draw_cloud, draw_curves, draw_spectrum, draw_spread
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
