"""A sweep as one HTML page without anything from elsewhere: what is known, into the template sweep.html."""

from collections.abc import Mapping, Sequence

from pipelines.compare.page import comparison_content
from pipelines.compare.statistics import Comparison
from pipelines.compare.wording import short_number
from pipelines.config import schema
from pipelines.pages.render import render
from pipelines.sweeps.plots import FEWEST_SCORES, draw_figures, draw_slices, restyle_figure
from pipelines.sweeps.records import Trial
from pipelines.sweeps.spaces import Space

SECTIONS = {"tested": "Winner against defaults", "settings": "Settings", "trials": "Trials", "sweep": "The sweep"}

# Of the figures of all settings together.
CAPTIONS = {
    "parallel_coordinates": "Each trial as a line through its score and settings, the stronger the better",
    "importance": "Importance of each setting for the score (fANOVA)",
    "changes": "Settings that changed on the way, a line for each trial, the stronger the better it ended",
}


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
        comparison: The winner's tests against those of the defaults; without lines where nothing was tested.
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
        sections=SECTIONS,
        comparison=comparison_content(comparison) if comparison.lines else None,
        figures=[(restyle_figure(figures[key], text), text) for key, text in CAPTIONS.items() if key in figures],
        slices=[] if "changes" in figures else draw_slices(space, trials),
        has_importance="importance" in figures or "changes" in figures,
        fewest_scores=FEWEST_SCORES,
        heads=("trial", "val/map_at_r", "epochs", *keys, "ended"),
        rows=[row(trial) for trial in ranked],
        facts=facts.items(),
        footer=footer,
    )
