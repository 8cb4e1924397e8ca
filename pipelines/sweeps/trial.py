"""What runs in a trial's process: named runs of a point, and what they report to Ray Tune.

A trial is a run of `dml train` by a name of its own in the sweep's folder, without its test: what was interrupted goes
on by its name, and what is finished is not trained again, whatever Ray Tune remembers of it.
"""

import os
import statistics
from typing import Any, NamedTuple

import ray.train
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from pipelines.config.recipe import with_values
from pipelines.config.schema import Config
from pipelines.console import QUIET, RunFailed
from pipelines.kept import keep_between_runs
from pipelines.runs.outcome import SweepMember
from pipelines.runs.train import run_training
from pipelines.sweeps.population import copy_to_new_run, open_as_tune_checkpoint, settings_after
from pipelines.sweeps.records import (
    FAILED,
    SCORE,
    FinalConfig,
    FinalReport,
    Sweep,
    TrialConfig,
    TrialReport,
    fold_values,
    trial_name,
)
from pipelines.sweeps.spaces import Point


def run_trial(config: TrialConfig, sweep: Sweep, in_process: bool) -> None:
    """Train one point, fold after fold, each as a run by a name of its own, and report a TrialReport as they go.

    Args:
        config: Holds the point.
        sweep: The sweep that it belongs to.
        in_process: Train in this process, not on workers of Ray Train.
    """
    prepare_process()
    folds, scores, checkpoint = sweep.options.folds, list[float](), tune.get_checkpoint()
    settings = config["point"] if checkpoint is None else settings_after(checkpoint, config["point"])
    base, name = with_values(sweep.config, settings), trial_name(tune.get_context().get_trial_id(), config, settings)
    for fold in range(folds):
        run = with_values(base, _run_location(sweep, name, fold) | (fold_values(fold, folds) if folds > 1 else {}))
        if checkpoint is not None:
            copy_to_new_run(checkpoint, run)
        progress = _FoldProgress(
            schedule=sweep.options.schedule,
            settings=settings,
            run=run,
            earlier_scores=[*scores],
            earlier_epochs=fold * base.epochs,
            total_epochs=folds * base.epochs,
        )
        member = SweepMember(
            sweep.uri, sweep.run_id, sweep.data, {"trial": name, "fold": str(fold)}, False, progress.report
        )
        try:
            member = member if in_process else member._replace(callbacks=[_Relay(progress)])
            outcome = run_training(run, QUIET, in_process, member)
        except RunFailed as error:
            # Again it would fail again. To the search it is the worst that there is.
            tune.report({**progress.trial_report(0.0, 0), SCORE: 0.0, FAILED: str(error)})
            return
        scores.append(outcome.metrics["val/best_map_at_r"])
    # Once more, should the last fold have been done before, and so have reported nothing.
    tune.report({**progress.trial_report(scores[-1], base.epochs)})


class _FoldProgress(NamedTuple):
    """Turns what the run of a fold reports into reports of its trial.

    Attributes:
        schedule: Of the sweep.
        settings: Of the trial.
        run: The fold's config.
        earlier_scores: Best scores of the folds before.
        earlier_epochs: Epochs of the folds before.
        total_epochs: Epochs of all folds.
    """

    schedule: str
    settings: Point
    run: Config
    earlier_scores: list[float]
    earlier_epochs: int
    total_epochs: int

    def trial_report(self, score: float, epoch: int) -> TrialReport:
        """Return the trial's report for the fold's best score so far and its epoch."""
        epochs = self.earlier_epochs + epoch
        return {
            "score": statistics.mean([*self.earlier_scores, score]),
            "epochs_done": epochs,
            "clock": min(epochs, self.total_epochs - 1),
            "settings": self.settings,
        }

    def report(self, metrics: dict[str, Any]) -> None:
        """Report to Ray Tune, in the trial's own process. metrics: of a validated epoch of the fold."""
        report, checkpoint = self.trial_report(metrics["val/best_map_at_r"], metrics["epoch"]), None
        if self.schedule == "pbt" and report["epochs_done"] < self.total_epochs:
            checkpoint = open_as_tune_checkpoint(self.run, metrics["epoch"])
        tune.report({**report}, checkpoint=checkpoint)


class _Relay(TuneReportCallback):
    """Passes what workers report on to Ray Tune; called by Ray Train's controller."""

    def __init__(self, progress: _FoldProgress):
        super().__init__()
        self.progress = progress

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: ray.train.Checkpoint | None
    ) -> None:
        report = self.progress.trial_report(metrics[0]["val/best_map_at_r"], metrics[0]["epoch"])
        super().after_report(run_context, [{**report}], checkpoint)


def run_final(config: FinalConfig, sweep: Sweep, in_process: bool) -> None:
    """Train, test and register a run of some settings, and report a FinalReport at its end.

    Args:
        config: Holds the settings and the seed.
        sweep: The sweep that it belongs to.
        in_process: Train in this process, not on workers of Ray Train.
    """
    prepare_process()
    task = config["point"]
    location = {"name": f"{task['role']}-s{task['seed']}", "storage": sweep.folder}
    member = SweepMember(sweep.uri, sweep.run_id, sweep.data, {"final": task["role"]}, test=True)
    run = with_values(sweep.config, task["settings"] | {"seed": task["seed"]} | location)
    outcome = run_training(run, QUIET, in_process, member)
    report: FinalReport = {
        "score": outcome.metrics["val/best_map_at_r"],
        "name": outcome.name,
        "run_id": outcome.run_id,
        "model": outcome.model or "",
    }
    tune.report({**report})


def prepare_process() -> None:
    """Have this process serve trial after trial."""
    keep_between_runs()
    # The next trial waits so many seconds for one that was ended early; after Ray Tune's own 2, on a busy machine, it
    # would start a process anew instead, and import everything.
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "30")


def _run_location(sweep: Sweep, trial: str, fold: int) -> dict[str, str]:
    return {"name": f"{trial}-f{fold}" if sweep.options.folds > 1 else trial, "storage": sweep.folder}
