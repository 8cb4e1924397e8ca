"""What runs in a trial's process: named runs of a point, and what they tell Ray Tune.

A trial is a run of `dml train` by a name of its own in the sweep's folder, without its test: what was interrupted goes
on by its name, and what is finished is not trained again, whatever Ray Tune remembers of it.
"""

import io
import statistics
from typing import Any, NamedTuple

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from rich.console import Console

from pipelines.cluster.progress import Reporter
from pipelines.cluster.worker import device_of_worker
from pipelines.config.recipe import parse_config, with_values
from pipelines.config.schema import Config
from pipelines.console import RunFailed
from pipelines.data.sets import load_splits
from pipelines.data.sources import Sources
from pipelines.models.build import build_learner
from pipelines.runs.outcome import SweepMember
from pipelines.runs.train import run_training
from pipelines.sweeps.population import settings_after, start_from, tune_checkpoint
from pipelines.sweeps.records import CLOCK, EPOCHS, FAILED, SCORE, SETTINGS, Sweep, fold_values, trial_name
from pipelines.sweeps.spaces import Point

QUIET = Console(file=io.StringIO())


def run_trial(config: dict[str, Any], sweep: Sweep, here: bool) -> None:
    """One point, fold after fold, each a run by a name of its own. Reports the mean of the folds' best so far."""
    folds, bests, given = sweep.options.folds, list[float](), tune.get_checkpoint()
    settings = config["point"] if given is None else settings_after(given, config["point"])
    base, name = with_values(sweep.config, settings), trial_name(tune.get_context().get_trial_id(), settings)
    for fold in range(folds):
        run = with_values(base, run_location(sweep, name, fold) | (fold_values(fold, folds) if folds > 1 else {}))
        if given is not None:
            start_from(given, run)
        progress = _Progress(sweep.options.schedule, settings, run, [*bests], fold * base.epochs, folds * base.epochs)
        part = SweepMember(sweep.uri, sweep.run_id, {"trial": name, "fold": str(fold)}, False, progress.report)
        try:
            part = part if here else part._replace(callbacks=[Relay(progress)])
            outcome = run_training(run, QUIET, here, part)
        except RunFailed as error:
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
            handed_on = tune_checkpoint(self.run, metrics["epoch"])
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
    part = SweepMember(sweep.uri, sweep.run_id, {"final": who}, test=True)
    outcome = run_training(with_values(sweep.config, values), QUIET, here, part)
    told = {"name": outcome.name, "run_id": outcome.run_id, "model": outcome.model or ""}
    tune.report({SCORE: outcome.metrics["val/best_map_at_r"], **told})


def run_location(sweep: Sweep, trial: str, fold: int) -> dict[str, Any]:
    return {"name": f"{trial}-f{fold}" if sweep.options.folds > 1 else trial, "storage": sweep.folder}


def compute_features(job: dict[str, Any]) -> dict[str, float]:
    """The features of a frozen backbone, once, with all CPUs, before trials share them."""
    config = parse_config(job["config"])
    splits, device = load_splits(config, job["unreadable"]), device_of_worker(config)
    learner = build_learner(config, len(splits.train.class_names)).to(device)
    if config.precision == "float64":
        learner.double()
    Sources(config, learner, device, job["cpus"], Reporter(None)).of(splits.train)
    return {}
