"""`dml tune`: a search of settings on validation classes, then the winner beside the defaults on the test classes.

Ray Tune draws the points and ends what falls behind. Nothing of the test classes is seen before the winner is known.
"""

import contextlib
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import pyarrow.fs
from ray import tune
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search.optuna import OptunaSearch
from rich.console import Console

from pipelines.cluster.devices import resolve_devices
from pipelines.cluster.launch import run_in_process
from pipelines.cluster.session import open_cluster
from pipelines.compare.statistics import METRICS, Comparison, compare_runs
from pipelines.config.identity import with_absolute_paths
from pipelines.config.recipe import parse_config, to_yaml, with_values
from pipelines.config.schema import Config
from pipelines.console import RunFailed
from pipelines.data import check
from pipelines.data.sets import load_splits
from pipelines.models.checkpoint import read_history
from pipelines.models.run_folder import RunFolder, local_copy, newest_checkpoint
from pipelines.runs.record import record_run
from pipelines.sweeps import spaces
from pipelines.sweeps.plots import draw_figures
from pipelines.sweeps.population import pbt_scheduler
from pipelines.sweeps.records import CLOCK, EPOCHS, SCORE, Sweep, SweepOptions, SweepOutcome, Trial, fold_values
from pipelines.sweeps.spaces import Point, Space, own_point, space_of
from pipelines.sweeps.stages import Placement, failure_reason, place_trials, read_trial, run_stage
from pipelines.sweeps.trial import compute_features, run_final, run_trial
from pipelines.tracking.models import set_alias
from pipelines.tracking.runs import end_run, log_figure, log_metrics, log_text, read_runs, resume_run, running_children
from pipelines.tracking.sender import MetricSender
from pipelines.tracking.server import default_uri, prepare_store, without_password


def end_interrupted_runs(uri: str, parent: str, storage: str) -> None:
    """Runs of a sweep that were ended in the middle: MLflow gets what they reached, and they are running no longer."""
    for run in running_children(uri, parent):
        files, root = pyarrow.fs.FileSystem.from_uri(storage)
        folder = f"{root}/{run.name}"
        if (newest := newest_checkpoint(files, folder)) is not None:
            with local_copy(files, f"{folder}/{newest}") as local:
                MetricSender(uri, run.run_id, read_history(local)).close()
        end_run(uri, run.run_id, "KILLED")


SEARCHES, SCHEDULES = ("optuna", "random", "grid"), ("asha", "none", "pbt")


def start_sweep(config: Config, options: SweepOptions, console: Console) -> SweepOutcome:
    """A new sweep. ValueError: bad input, before any trial. launch.RunFailed, KeyboardInterrupt: on the way."""
    for option, value, known in (("search", options.search, SEARCHES), ("schedule", options.schedule, SCHEDULES)):
        if value not in known:
            raise ValueError(f"--{option} {value}: {', '.join(known[:-1])} or {known[-1]}")
    config, space = space_of(options.space, config)
    if options.schedule == "pbt":
        if options.search != "random" or options.folds > 1 or config.worker_range[1] > 1:
            raise ValueError("--schedule pbt: it goes with --search random, --folds 1 and workers=1")
        if config.changes:
            raise ValueError("--schedule pbt: it finds `changes`, and cannot begin with some")
        pbt_scheduler(space, config, CLOCK, SCORE)
    if options.folds > 1:
        with_values(config, fold_values(0, options.folds))
    if config.name is None:
        parts = [config.data.name, options.space.replace(".py", "").replace("/", "-"), options.search]
        config = with_values(config, {"name": "-".join([*parts, datetime.now().strftime("%Y%m%d-%H%M%S")])})
    config = with_absolute_paths(config)
    folder = RunFolder(config)
    if folder.read("sweep.json") or folder.read("run.json"):
        raise ValueError(
            f"name={config.name} is taken in {config.storage}; to continue a sweep: --resume {config.name}"
        )
    with console.status("reading the data"):
        unreadable = check.unreadable(config.data, console)
        splits = load_splits(config, unreadable)
        if splits.validation is None:
            raise ValueError("data.validation_fraction=0: a sweep chooses by validation classes")
    uri = default_uri(Path.cwd())
    prepare_store(uri)
    domains = {
        f"space.{key}": f"{type(d.get_sampler()).__name__.strip('_')} {d.domain_str}" for key, d in space.items()
    }
    tags = {"kind": "sweep", **{key: str(value) for key, value in options._asdict().items()}}
    run_id = record_run(uri, config, config.flat() | domains, tags, splits)
    sweep = Sweep(str(config.name), f"{config.storage}/{config.name}", uri, run_id, config, options)
    folder.write(
        "sweep.json",
        {
            "run_id": run_id,
            "uri": without_password(uri),
            "options": options._asdict(),
            "config": config.model_dump(exclude_none=True),
        },
    )
    return _run_sweep(sweep, space, folder, console)


def resume_sweep(name: str, storage: str, console: Console) -> SweepOutcome:
    """Go on with a sweep that was killed or stopped, or repeat the outcome of one that finished."""
    config = with_absolute_paths(with_values(Config(), {"name": name, "storage": storage}))
    folder = RunFolder(config)
    if (begun := folder.read("sweep.json")) is None:
        raise ValueError(f"--resume {name}: no sweep of that name in {storage}; storage=FOLDER says where")
    if outcome := folder.read("outcome.json"):
        console.print(f"{name} is finished; this is its outcome")
        return SweepOutcome(**outcome)
    options = SweepOptions(**begun["options"])
    config, space = space_of(options.space, parse_config(begun["config"]))
    uri, own = begun["uri"], default_uri(Path.cwd())
    if without_password(own) == uri:
        uri = own  # with its password, which is kept nowhere
    prepare_store(uri)
    resume_run(uri, begun["run_id"], {})
    sweep = Sweep(name, f"{config.storage}/{name}", uri, begun["run_id"], config, options)
    return _run_sweep(sweep, space, folder, console)


def _run_sweep(sweep: Sweep, space: Space, folder: RunFolder, console: Console) -> SweepOutcome:
    started, status, config = time.monotonic(), "FAILED", sweep.config
    here = config.worker_range[1] == 1
    console.print(f"{sweep.folder}  (if interrupted: dml tune --resume {sweep.name})", highlight=False)
    cpus = (sweep.options.concurrent or 1) * config.worker_range[1] + (not here)
    try:
        with open_cluster(config, folder.logs, cpus, dashboard=not here):
            places = place_trials(sweep, here, console)
            if config.backbone.frozen:
                with console.status("features of the frozen backbone, for all trials"):
                    job = {"unreadable": check.unreadable(config.data, console)}
                    run_in_process(compute_features, resolve_devices(config, here=True), job)
            trials = _search(places, space)
            finished = [trial for trial in trials if trial.ended == "finished"]
            if not finished:
                raise RunFailed(f"none of {len(trials)} trials finished; {trials[0].reason}")
            best = max(finished, key=lambda trial: trial.score or 0.0)
            winner = with_values(config, {**best.point, "name": None, "storage": "runs"})
            folder.write("best.yaml", to_yaml(winner))
            _log(sweep, space, trials, best, winner)
            finals = _finals(places, best.point, own_point(config, space))
        found, model = _tested(sweep, finals)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        with contextlib.suppress(Exception):  # a server that is gone must not hide what happened
            end_interrupted_runs(sweep.uri, sweep.run_id, sweep.folder)
        end_run(sweep.uri, sweep.run_id, status)
    outcome = SweepOutcome(
        sweep=sweep.name,
        run_id=sweep.run_id,
        winner=best.point,
        score=best.score or 0.0,
        recipe=f"{folder.path}/best.yaml",
        model=model,
        trials=[trial._asdict() for trial in trials],
        tested=[line._asdict() for line in found.lines],
        warnings=found.warnings,
        seconds=time.monotonic() - started,
    )
    folder.write("outcome.json", outcome._asdict())
    folder.forget({final["name"] for final in finals})
    return outcome


def _search(places: Placement, space: Space) -> list[Trial]:
    sweep, options = places.sweep, places.sweep.options
    total = options.folds * sweep.config.epochs
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searched: Any
    if options.search == "optuna":
        own = own_point(sweep.config, space)
        known = [] if own is None else [{f"point/{key}": value for key, value in own.items()}]
        search = OptunaSearch(metric=SCORE, mode="max", seed=sweep.config.seed, points_to_evaluate=known or None)
        searched, count = space, options.samples
    else:
        listed = spaces.points(space, options.search, options.samples, sweep.config)
        search, searched, count = None, tune.grid_search(listed), len(listed)
    scheduler: Any = None
    if options.schedule == "pbt":
        scheduler = pbt_scheduler(space, sweep.config, CLOCK, SCORE)
    if options.schedule == "asha":
        # The last report comes at `total`; what reaches it is to end by itself.
        grace = max(sweep.config.evaluate_every, total // 9, 1)
        scheduler = AsyncHyperBandScheduler(
            EPOCHS, SCORE, "max", max_t=total + 1, grace_period=grace, reduction_factor=3
        )
    trials = run_stage(places, "search", run_trial, {"point": searched}, count, search, scheduler)
    return [read_trial(trial, total) for trial in trials]


def _log(sweep: Sweep, space: Space, trials: list[Trial], best: Trial, winner: Config) -> None:
    """What the search found, to MLflow: before the tests, which take long."""
    for name, figure in draw_figures(space, trials).items():
        log_figure(sweep.uri, sweep.run_id, figure, f"{name}.png")
    log_text(sweep.uri, sweep.run_id, to_yaml(winner), "best.yaml")
    log_metrics(sweep.uri, sweep.run_id, {"val/best_map_at_r": best.score or 0.0})


def _finals(places: Placement, winner: Point, own: Point | None) -> list[dict[str, Any]]:
    """Tested runs of the winner, first, and of the defaults, over the same seeds, none of them that of the search."""
    sweep = places.sweep
    settings = {"default": {}} if winner == own else {"winner": winner, "default": {}}
    seeds = range(sweep.config.seed + 1, sweep.config.seed + 1 + sweep.options.final_seeds)
    listed = [(who, seed, values) for seed in seeds for who, values in settings.items()]
    found = []
    for trial in run_stage(places, "final", run_final, {"point": tune.grid_search(listed)}, len(listed)):
        if trial.status != RayTrial.TERMINATED:
            raise RunFailed(f"a final run failed: {failure_reason(trial)}")
        found.append({"who": trial.config["point"][0], **trial.last_result})
    return sorted(found, key=lambda final: final["who"] == "default")


def _tested(sweep: Sweep, finals: list[dict[str, Any]]) -> tuple[Comparison, str | None]:
    """The tested runs compared, and the winner's best model, which becomes the champion."""
    runs = read_runs(sweep.uri, [final["run_id"] for final in finals])
    baseline = next(final["run_id"] for final in finals if final["who"] == "default")
    labels = {run.group: run.name.rpartition("-s")[0] for run in runs}
    found = compare_runs(runs, sweep.name, baseline, METRICS, labels)
    log_text(sweep.uri, sweep.run_id, found.page, "comparison.html")
    model = max((f for f in finals if f["who"] == finals[0]["who"]), key=lambda f: f[SCORE])["model"]
    if model:
        set_alias(sweep.uri, model, "champion")
    return found, model or None
