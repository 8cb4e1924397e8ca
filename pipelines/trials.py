"""What runs in a trial's process: named runs of a point, and what they tell Ray Tune.

A trial is a run of `dml train` by a name of its own in the sweep's folder, without its test: what was interrupted goes
on by its name, and what is finished is not trained again, whatever Ray Tune remembers of it.
"""

import hashlib
import io
import json
import statistics
from typing import Any, NamedTuple

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from rich.console import Console

from pipelines import build, evaluate, jobs, launch, population
from pipelines.config import Config
from pipelines.progress import Reporter
from pipelines.recipe import parse, replaced
from pipelines.spaces import Point

SCORE, EPOCHS, FAILED, SETTINGS = "score", "epochs_done", "failed", "settings"  # what trials report
CLOCK = "clock"  # epochs, but short of the end, where it would be too late to change settings


class Options(NamedTuple):
    """What a sweep is, beside the config it starts from.

    space: names of tune_spaces joined by +, or a FILE.py with a SPACE.  samples: points; of a grid, on each range.
    concurrent: trials at a time; None: as many as fit.  search: optuna, random, grid.  schedule: asha, none, pbt.
    folds: trainings of a point, on other validation classes each.  final_seeds: test runs of the winner, and as many of
    the defaults.
    """

    space: str
    samples: int = 32
    concurrent: int | None = None
    search: str = "optuna"
    schedule: str = "asha"
    folds: int = 1
    final_seeds: int = 5


class Sweep(NamedTuple):
    """A sweep under way.  folder: storage/NAME, holding all its runs.  uri, run_id: of MLflow, the parent run."""

    name: str
    folder: str
    uri: str
    run_id: str
    config: Config
    options: Options


QUIET = Console(file=io.StringIO())


def run_trial(config: dict[str, Any], sweep: Sweep, here: bool) -> None:
    """One point, fold after fold, each a run by a name of its own. Reports the mean of the folds' best so far."""
    folds, bests, given = sweep.options.folds, list[float](), tune.get_checkpoint()
    settings = config["point"] if given is None else population.followed(given, config["point"])
    base, name = replaced(sweep.config, settings), trial_name(tune.get_context().get_trial_id(), settings)
    for fold in range(folds):
        run = replaced(base, place(sweep, name, fold) | (fold_values(fold, folds) if folds > 1 else {}))
        if given is not None:
            population.begin_with(given, run)
        progress = _Progress(sweep.options.schedule, settings, run, [*bests], fold * base.epochs, folds * base.epochs)
        part = jobs.Part(sweep.uri, sweep.run_id, {"trial": name, "fold": str(fold)}, False, progress.report)
        try:
            part = part if here else part._replace(callbacks=[Relay(progress)])
            outcome = jobs.train(run, QUIET, here, part)
        except launch.RunFailed as error:
            # Again it would fail again. To the search it is the worst that there is.
            tune.report(progress.told({"val/best_map_at_r": 0.0, "epoch": 0}) | {SCORE: 0.0, FAILED: str(error)})
            return
        bests.append(outcome.metrics["val/best_map_at_r"])
    # Once more, should the last fold have been done before, and so have reported nothing.
    tune.report(progress.told({"val/best_map_at_r": bests[-1], "epoch": base.epochs}))


class _Progress(NamedTuple):
    """Of a fold, in the terms of its trial.

    settings: of the trial.  run: of the fold.  bests, epochs: best scores of the folds before, and their epochs.
    total: epochs of all folds.
    """

    schedule: str
    settings: Point
    run: Config
    bests: list[float]
    epochs: int
    total: int

    def told(self, metrics: dict[str, Any]) -> dict[str, Any]:
        score, done = statistics.mean([*self.bests, metrics["val/best_map_at_r"]]), self.epochs + metrics["epoch"]
        return {SCORE: score, EPOCHS: done, CLOCK: min(done, self.total - 1), SETTINGS: self.settings}

    def report(self, metrics: dict[str, Any]) -> None:
        told, handed_on = self.told(metrics), None
        if self.schedule == "pbt" and told[EPOCHS] < self.total:
            handed_on = population.handed_on(self.run, metrics["epoch"])
        tune.report(told, checkpoint=handed_on)


class Relay(TuneReportCallback):
    """What workers report, told to Ray Tune, by Ray Train's controller."""

    def __init__(self, progress: _Progress):
        super().__init__()
        self.progress = progress

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        super().after_report(run_context, [self.progress.told(metrics[0])], checkpoint)


def run_final(config: dict[str, Any], sweep: Sweep, here: bool) -> None:
    """A whole run of some settings, its test and its model too."""
    who, seed, settings = config["point"]
    values = settings | {"seed": seed, "name": f"{who}-s{seed}", "storage": sweep.folder}
    part = jobs.Part(sweep.uri, sweep.run_id, {"final": who}, test=True)
    outcome = jobs.train(replaced(sweep.config, values), QUIET, here, part)
    told = {"name": outcome.name, "run_id": outcome.run_id, "model": outcome.model or ""}
    tune.report({SCORE: outcome.metrics["val/best_map_at_r"], **told})


def trial_name(trial_id: str, point: Point) -> str:
    """Its number, and its settings: a number that a killed sweep gave twice does not mix two points."""
    plain = json.loads(json.dumps(point))  # numbers as keys are texts once Ray Tune has kept them
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:6]
    return f"t{trial_id.rpartition('_')[2]}-{digest}"


def place(sweep: Sweep, trial: str, fold: int) -> dict[str, Any]:
    return {"name": f"{trial}-f{fold}" if sweep.options.folds > 1 else trial, "storage": sweep.folder}


def fold_values(fold: int, folds: int) -> dict[str, Any]:
    return {"data.fold": fold, "data.folds": folds}


def warm(job: dict[str, Any]) -> dict[str, float]:
    """The features of a frozen backbone, once, with all CPUs, before trials share them."""
    config = parse(job["config"])
    splits, device = build.splits(config, job["unreadable"]), evaluate.device(config)
    learner = build.learner(config, len(splits.train.class_names)).to(device)
    if config.precision == "float64":
        learner.double()
    evaluate.Sources(config, learner, device, job["cpus"], Reporter(None)).of(splits.train)
    return {}
