"""Ray Tune: stages of trials, dealt to the machine, shown, and read."""

import logging
import math
import warnings
from typing import Any, NamedTuple

import ray
from ray import tune
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import PopulationBasedTraining
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pipelines.cluster.devices import resolve_devices
from pipelines.cluster.failures import call_interruptibly
from pipelines.console import RunFailed
from pipelines.sweeps.records import EPOCHS, FAILED, SCORE, SETTINGS, Sweep, Trial, trial_name

logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what fails is told by us

warnings.filterwarnings("ignore", "The reported value is ignored")  # Optuna's, of what a resumed trial tells again

RETRIES = 2  # of a trial whose process is lost


class Placement(NamedTuple):
    """Where a sweep's trials run.

    here: in Tune's own processes, not on workers of Ray Train.  at_once: how many.  resources: what Ray sets aside for
    each.
    """

    sweep: Sweep
    here: bool
    at_once: int
    resources: dict[str, float]
    console: Console


def place_trials(sweep: Sweep, here: bool, console: Console) -> Placement:
    """So many trials at a time that their workers fit beside each other."""
    resources, workers = ray.cluster_resources(), sweep.config.worker_range[1]
    config = resolve_devices(sweep.config)
    use_gpu, kind = bool(config.use_gpu), "GPU" if config.use_gpu else "CPU"
    if config.data.loader == "ray":
        resources["CPU"] /= 2  # the other half decodes; see launch.cluster
    fit = max(1, int(resources[kind] - (not here and not use_gpu)) // workers)
    at_once = min(sweep.options.concurrent or fit, fit)
    asked = sweep.options.concurrent
    console.print(
        f"{at_once} trials at a time, each on {workers} of {resources[kind]:g} {kind}s"
        + (f" (more than {fit} do not fit, the others wait)" if asked and asked > fit else ""),
        highlight=False,
    )
    # Of the trials of a population all are begun and some are paused: their shares alone say how many run.
    share = {"CPU": math.floor(1e4 * resources["CPU"] / at_once) / 1e4} | ({"GPU": 1.0} if use_gpu else {})
    return Placement(sweep, here, at_once, share if here else {"CPU": 0.01}, console)  # workers have their own


def run_stage(
    places: Placement,
    stage: str,
    function: Any,
    space: dict[str, Any],
    count: int,
    search: Any = None,
    scheduler: Any = None,
) -> list[RayTrial]:
    """All `count` trials of a stage; of one that was interrupted, what it lacks.

    space: a grid of them all, or what `search` draws from.
    """
    sweep = places.sweep
    given = tune.with_parameters(function, sweep=sweep, here=places.here)
    trainable = tune.with_resources(given, places.resources)
    folder = f"{sweep.folder}/tune_{stage}"
    if tune.Tuner.can_restore(folder):
        tuner = tune.Tuner.restore(folder, trainable, restart_errored=True, param_space=space)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                num_samples=count if search else 1,
                max_concurrent_trials=None if isinstance(scheduler, PopulationBasedTraining) else places.at_once,
                search_alg=search,
                scheduler=scheduler,
                reuse_actors=places.here,
            ),
            run_config=tune.RunConfig(
                name=f"tune_{stage}",
                storage_path=sweep.folder,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=4),  # for others to go on from
                callbacks=[StageProgress()],
                verbose=0,
            ),
        )
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=places.console, transient=True) as bar:
        StageProgress.bar, StageProgress.task = bar, bar.add_task(stage, total=count, facts="")
        try:
            results = call_interruptibly(tuner.fit)
        except tune.TuneError as error:
            raise RunFailed(str(error).strip().splitlines()[-1]) from error
    return results._experiment_analysis.trials


class StageProgress(tune.Callback):
    """Shows how far the trials are. Ray pickles it with the sweep; what shows is the process's own."""

    bar: Progress
    task: Any

    def on_step_end(self, iteration: int, trials: list[RayTrial], **info: Any) -> None:
        ended = [trial for trial in trials if trial.is_finished()]
        scores = [t.last_result[SCORE] for t in trials if t.last_result and SCORE in t.last_result]
        failed = sum(t.status == RayTrial.ERROR or FAILED in (t.last_result or {}) for t in ended)
        facts = f"best {max(scores):.4f}" if scores else ""
        facts += f"  {failed} failed" if failed else ""
        StageProgress.bar.update(StageProgress.task, completed=len(ended), facts=facts)


def read_trial(trial: RayTrial, total: int) -> Trial:
    result = trial.last_result or {}
    point, score, epochs = result.get(SETTINGS, trial.config["point"]), result.get(SCORE), result.get(EPOCHS, 0)
    name = trial_name(trial.trial_id, point)
    if trial.status == RayTrial.ERROR:
        return Trial(name, point, None, epochs, "failed", failure_reason(trial))
    if FAILED in result:
        return Trial(name, point, None, epochs, "failed", result[FAILED])
    return Trial(name, point, score, epochs, "finished" if epochs >= total else "stopped", "")


def failure_reason(trial: RayTrial) -> str:
    lines = str(trial.get_error() or "").strip().splitlines()
    return lines[-1] if lines else f"ended as {trial.status}"
