"""What a sweep shows: which settings went together, which mattered, and what each did to the score."""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import optuna
from matplotlib.figure import Figure
from optuna.visualization import matplotlib as plots
from ray.tune.search.optuna import OptunaSearch

if TYPE_CHECKING:
    from pipelines.spaces import Space
    from pipelines.tuner import Trial

FEWEST = 8  # different scores, below which Optuna's forest of trees has nothing to split


def study(space: "Space", trials: Sequence["Trial"]) -> optuna.Study:
    """The finished trials as one of Optuna's studies: what was ended early has a score of fewer epochs."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found = optuna.create_study(direction="maximize")
    distributions = OptunaSearch.convert_search_space(space)
    for trial in trials:
        if trial.ended == "finished":
            params = {key: trial.point[key] for key in space}
            found.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=trial.score))
    return found


def figures(space: "Space", trials: Sequence["Trial"]) -> dict[str, Figure]:
    """name -> figure: parallel_coordinates, importance, slices, without those that so few trials do not carry; or
    `changes`, where settings changed on the way."""
    if any("changes" in trial.point for trial in trials if trial.score is not None):
        return {"changes": changes(trials)}
    made, found = dict[str, Figure](), study(space, trials)
    drawn: dict[str, Any] = {"parallel_coordinates": plots.plot_parallel_coordinate, "slices": plots.plot_slice}
    if len({trial.value for trial in found.trials}) >= FEWEST:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        drawn["importance"] = partial(plots.plot_param_importances, evaluator=evaluator)
    with warnings.catch_warnings(), plt.rc_context():  # Optuna leaves its style behind
        warnings.simplefilter("ignore")
        for name, draw in drawn.items():
            axes: Any = draw(found, target_name="val/map_at_r")
            figure = np.ravel(axes)[0].figure
            figure.set_size_inches(max(8, 3 * np.size(axes)), 5)
            made[name] = figure
            plt.close(figure)
    return made


def changes(trials: Sequence["Trial"]) -> Figure:
    """Each setting that changed, by epochs, a line for each trial, the darker the better it ended."""
    finished = sorted((t for t in trials if t.score is not None), key=lambda t: t.score or 0.0)
    all_changes = [{int(e): values for e, values in t.point.get("changes", {}).items()} for t in finished]
    keys = sorted({key for found in all_changes for values in found.values() for key in values})
    scores = [trial.score or 0.0 for trial in finished]
    scale = plt.cm.ScalarMappable(plt.Normalize(min(scores), max(scores)), "viridis_r")
    with plt.style.context("ggplot"):
        figure, grid = plt.subplots(
            1, len(keys), figsize=(max(8, 3 * len(keys)), 5), squeeze=False, layout="constrained"
        )
    for axis, key in zip(grid[0], keys, strict=True):
        paths = [
            {0: trial.point[key]} | {epoch: new[key] for epoch, new in found.items() if key in new}
            for trial, found in zip(finished, all_changes, strict=True)
        ]
        choices = {value for path in paths for value in path.values()}
        names = [] if all(isinstance(value, int | float) for value in choices) else sorted(map(str, choices))
        if names:
            axis.set_yticks(range(len(names)), names)
        for trial, path in zip(finished, paths, strict=True):
            heights = [names.index(str(value)) if names else value for value in path.values()]
            ends = [*path, trial.epochs]
            axis.stairs(heights, ends, baseline=None, color=scale.to_rgba(np.array(trial.score)), lw=2)
        axis.set(title=key, xlabel="epoch")
    figure.colorbar(scale, ax=grid[0].tolist(), label="val/map_at_r")
    plt.close(figure)
    return figure
