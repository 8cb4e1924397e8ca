"""Run stages of trials by Ray Tune: dealt to the machine, shown, and read."""

import logging
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, cast

import ray
from ray import tune
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher
from rich.console import Console
from rich.progress import Progress, TaskID, TimeElapsedColumn

from pipelines.cluster.devices import resolve_devices
from pipelines.cluster.failures import call_interruptibly
from pipelines.console import RunFailed, progress_bar
from pipelines.sweeps.records import EPOCHS, FAILED, SCORE, SETTINGS, Sweep, Trial, TrialConfig, trial_name

logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the reasons of failures are printed by us

warnings.filterwarnings("ignore", "The reported value is ignored")  # Optuna's, where a resumed trial reports again

RETRIES = 2  # of a trial whose process is lost


class Placement(NamedTuple):
    """Where a sweep's trials run.

    Attributes:
        sweep: The sweep.
        in_process: In Ray Tune's own processes, not on workers of Ray Train.
        concurrent: Trials at a time.
        resources: What Ray sets aside for each trial.
        console: Where progress is shown.
    """

    sweep: Sweep
    in_process: bool
    concurrent: int
    resources: dict[str, float]
    console: Console


def place_trials(sweep: Sweep, in_process: bool, console: Console) -> Placement:
    """Plan as many trials at a time as have room for their workers beside each other."""
    resources, workers = ray.cluster_resources(), sweep.config.worker_range[1]
    config = resolve_devices(sweep.config)
    use_gpu, device = bool(config.use_gpu), "GPU" if config.use_gpu else "CPU"
    if config.data.loader == "ray":
        resources["CPU"] /= 2  # the other half decodes, see session.open_cluster
    per_device = int(1 / config.gpus_per_worker + 1e-9) if use_gpu else 1  # Ray splits no worker over two GPUs
    fit = max(1, int(resources[device] - (not in_process and not use_gpu)) * per_device // workers)
    wanted = sweep.options.concurrent
    concurrent = min(wanted or fit, fit)
    of_each = f"{config.gpus_per_worker:g}" if per_device > 1 else str(workers)
    console.print(
        f"{concurrent} trials at a time, each on {of_each} of {resources[device]:g} {device}s"
        + (f" (more than {fit} do not fit, the others wait)" if wanted and wanted > fit else ""),
        highlight=False,
    )
    # Of the trials of a population all are begun and some are paused: their shares alone say how many run.
    share = {"CPU": math.floor(1e4 * resources["CPU"] / concurrent) / 1e4} | (
        {"GPU": config.gpus_per_worker} if use_gpu else {}
    )
    # Workers of Ray Train have resources of their own.
    return Placement(sweep, in_process, concurrent, share if in_process else {"CPU": 0.01}, console)


def run_stage(
    placement: Placement,
    stage: str,
    trainable: Callable[..., None],
    points: Mapping[str, object],
    count: int,
    search: Searcher | None = None,
    scheduler: TrialScheduler | None = None,
) -> list[RayTrial]:
    """Run all trials of a stage; of a stage that was interrupted, what it lacks.

    Args:
        placement: Where they run.
        stage: Its name, in the sweep's folder and on the bar.
        trainable: Called with a config {"point": ...}, the sweep and `in_process`.
        points: A grid of all points, or the space that `search` draws them from.
        count: How many trials there are.
        search: Draws the points; None: `points` is a grid.
        scheduler: Ends trials early or changes their settings; None: all go to their end.

    Returns:
        All trials of the stage, with those that ended before an interruption.

    Raises:
        RunFailed: Ray Tune failed.
    """
    sweep = placement.sweep
    with_sweep = tune.with_parameters(trainable, sweep=sweep, in_process=placement.in_process)
    placed = tune.with_resources(with_sweep, placement.resources)
    folder, space = f"{sweep.folder}/tune_{stage}", {"point": points}
    if tune.Tuner.can_restore(folder):
        tuner = tune.Tuner.restore(folder, placed, restart_errored=True, param_space=space)
    else:
        tuner = tune.Tuner(
            placed,
            param_space=space,
            tune_config=tune.TuneConfig(
                num_samples=count if search else 1,
                max_concurrent_trials=None if isinstance(scheduler, PopulationBasedTraining) else placement.concurrent,
                search_alg=search,
                scheduler=scheduler,
                reuse_actors=placement.in_process,
            ),
            run_config=tune.RunConfig(
                name=f"tune_{stage}",
                storage_path=sweep.folder,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=4),  # for others to go on from
                callbacks=[StageMonitor()],
                verbose=0,
            ),
        )
    with progress_bar(placement.console, TimeElapsedColumn()) as bar:
        StageMonitor.bar, StageMonitor.task = bar, bar.add_task(stage, total=count, facts="")
        try:
            call_interruptibly(tuner.fit)
        except tune.TuneError as error:
            raise RunFailed(str(error).strip().splitlines()[-1], goes_on=True) from error
    return StageMonitor.trials


class StageMonitor(tune.Callback):
    """Shows how far the trials of a stage are, and hands them over at its end.

    Ray Tune pickles the callback with the stage, and a restored stage has a copy of it. Hence what it shows on and
    hands over belongs to the class: a process runs one stage at a time.

    Attributes:
        bar: Where progress is shown.
        task: The stage's line of the bar.
        trials: All trials of the stage that ended last.
    """

    bar: ClassVar[Progress]
    task: ClassVar[TaskID]
    trials: ClassVar[list[RayTrial]]

    def on_step_end(self, iteration: int, trials: list[RayTrial], **info: object) -> None:
        ended = [trial for trial in trials if trial.is_finished()]
        scores = [t.last_result[SCORE] for t in trials if t.last_result and SCORE in t.last_result]
        failed = sum(t.status == RayTrial.ERROR or FAILED in (t.last_result or {}) for t in ended)
        facts = f"best {max(scores):.4f}" if scores else ""
        facts += f"  {failed} failed" if failed else ""
        StageMonitor.bar.update(StageMonitor.task, completed=len(ended), facts=facts)

    def on_experiment_end(self, trials: list[RayTrial], **info: object) -> None:
        StageMonitor.trials = list(trials)


def read_trial(trial: RayTrial, sweep: Sweep) -> Trial:
    """Return what a trial of a sweep's search came to."""
    result: dict[str, Any] = trial.last_result or {}  # a TrialReport and Ray Tune's own; empty before the first report
    point, score, epochs = result.get(SETTINGS, trial.config["point"]), result.get(SCORE), result.get(EPOCHS, 0)
    name = trial_name(trial.trial_id, cast(TrialConfig, trial.config), point)
    if trial.status == RayTrial.ERROR:
        return Trial(name, point, None, epochs, "failed", failure_reason(trial))
    if FAILED in result:
        return Trial(name, point, None, epochs, "failed", result[FAILED])
    total = sweep.options.folds * point.get("epochs", sweep.config.epochs)
    return Trial(name, point, score, epochs, "finished" if epochs >= total else "stopped", "")


def failure_reason(trial: RayTrial) -> str:
    """Return in one line why a trial failed."""
    lines = str(trial.get_error() or "").strip().splitlines()
    return (
        lines[-1].removeprefix(f"{RunFailed.__module__}.{RunFailed.__name__}: ")
        if lines
        else f"ended as {trial.status}"
    )
