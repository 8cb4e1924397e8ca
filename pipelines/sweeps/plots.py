"""Plots of a sweep: which settings went together, which mattered, and what each did to the score."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import optuna
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle, StepPatch
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullLocator
from optuna.visualization import matplotlib as optuna_plots
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.sample import Categorical, LogUniform

from pipelines.pages import svg
from pipelines.pages.svg import SERIES, STYLE, to_svg
from pipelines.sweeps.records import Trial
from pipelines.sweeps.spaces import Space

FEWEST_SCORES = 8  # different scores, below which Optuna's forest of trees has nothing to split


def draw_figures(space: Space, trials: Sequence[Trial]) -> dict[str, Figure]:
    """Draw the plots of all settings together.

    Args:
        space: What was searched.
        trials: All trials of the sweep.

    Returns:
        Figures by name: parallel_coordinates, slices and, from FEWEST_SCORES on, importance; where settings changed on
        the way, `changes` alone.
    """
    if any("changes" in trial.point for trial in trials if trial.score is not None):
        return {"changes": draw_changes(trials)}
    study = make_study(space, trials)
    # Functions of Optuna that return axes, one or an array.
    drawings: dict[str, Callable[..., Any]] = {
        "parallel_coordinates": optuna_plots.plot_parallel_coordinate,
        "slices": optuna_plots.plot_slice,
    }
    if len({trial.value for trial in study.trials}) >= FEWEST_SCORES:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        drawings["importance"] = partial(optuna_plots.plot_param_importances, evaluator=evaluator)
    figures = dict[str, Figure]()
    with warnings.catch_warnings(), plt.rc_context():  # Optuna leaves its style behind
        warnings.simplefilter("ignore")  # of experimental features
        for name, draw in drawings.items():
            axes = draw(study, target_name="val/map_at_r")
            figure = np.ravel(axes)[0].figure
            figure.set_size_inches(max(8, 3 * np.size(axes)), 5)
            figures[name] = figure
            plt.close(figure)
    return figures


def make_study(space: Space, trials: Sequence[Trial]) -> optuna.Study:
    """Make a study of Optuna from the finished trials: what was stopped early has a score of fewer epochs."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    distributions = OptunaSearch.convert_search_space(space)
    for trial in trials:
        if trial.ended == "finished":
            params = {key: trial.point[key] for key in space}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=trial.score))
    return study


def draw_changes(trials: Sequence[Trial]) -> Figure:
    """Draw each setting that changed on the way over the epochs, a line for each trial, the darker the better."""
    scored = sorted((t for t in trials if t.score is not None), key=lambda t: t.score or 0.0)
    all_changes = [{int(e): values for e, values in t.point.get("changes", {}).items()} for t in scored]
    keys = sorted({key for changes in all_changes for values in changes.values() for key in values})
    scores = [trial.score or 0.0 for trial in scored]
    scale = plt.cm.ScalarMappable(plt.Normalize(min(scores), max(scores)), "viridis_r")
    with plt.style.context("ggplot"):
        figure, grid = plt.subplots(
            1, len(keys), figsize=(max(8, 3 * len(keys)), 5), squeeze=False, layout="constrained"
        )
    for axis, key in zip(grid[0], keys, strict=True):
        paths = [  # epoch to the value from there on
            {0: trial.point[key]} | {epoch: values[key] for epoch, values in changes.items() if key in values}
            for trial, changes in zip(scored, all_changes, strict=True)
        ]
        choices = {value for path in paths for value in path.values()}
        names = [] if all(isinstance(value, int | float) for value in choices) else sorted(map(str, choices))
        if names:
            axis.set_yticks(range(len(names)), names)
        for trial, path in zip(scored, paths, strict=True):
            heights = [names.index(str(value)) if names else value for value in path.values()]
            edges = [*path, trial.epochs]
            axis.stairs(heights, edges, baseline=None, color=scale.to_rgba(np.array(trial.score)), lw=2)
        axis.set(title=key, xlabel="epoch")
    figure.colorbar(scale, ax=grid[0].tolist(), label="val/map_at_r")
    plt.close(figure)
    return figure


def restyle_figure(figure: Figure, alt: str) -> Markup:
    """Turn a figure of draw_figures into SVG in the colours of our pages.

    A trial's line is the stronger, the better it ended; bars are of one colour.

    Args:
        figure: The figure, which is changed.
        alt: What it shows, for those who do not see it; the lengths of bars are added.
    """
    for lines in figure.findobj(LineCollection):
        assert isinstance(lines, LineCollection)
        scores = lines.get_array()
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
        for rank, step in enumerate(steps, 1):
            step.set_edgecolor(to_rgba(SERIES[0], 0.12 + 0.88 * (rank / len(steps)) ** 2))
        if not steps:  # whose title is the setting
            axis.set_title("")
            axis.set_title("", loc="left")
        if legend := axis.get_legend():
            legend.remove()
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_fontsize(9)
    return to_svg(figure, alt)


@rc_context(STYLE)
def draw_slices(space: Space, trials: Sequence[Trial]) -> list[Markup]:
    """Draw each setting against the score of the finished trials, for a page; the best is marked."""
    finished = [trial for trial in trials if trial.ended == "finished"]
    scores, drawings = [trial.score or 0.0 for trial in finished], []
    for key, domain in space.items():
        values = [trial.point[key] for trial in finished]
        figure, axis = svg.new_panel(key, ylabel="val/map_at_r")
        if isinstance(domain, Categorical):
            values = [*map(str, values)]
        elif isinstance(domain.get_sampler(), LogUniform):
            axis.set_xscale("log")
            axis.xaxis.set(
                major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator()
            )
        axis.plot(values, scores, "o", color=SERIES[0], ms=4.5, alpha=0.8, mew=0)
        axis.grid(axis="y", lw=0.6)
        best = max(range(len(finished)), key=lambda i: scores[i])
        axis.plot(values[best], scores[best], "D", color=SERIES[1], ms=6)
        alt = f"{key} against val/map_at_r of {len(finished)} trials, the best {scores[best]:.4f} at {values[best]}"
        drawings.append(to_svg(figure, alt))
    return drawings
