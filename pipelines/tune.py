"""`dml tune`: a search of settings on validation classes, then the winner beside the defaults on the test classes.

Ray Tune draws the points and ends what falls behind. Nothing of the test classes is seen before the winner is known.
"""

import contextlib
import time
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search.optuna import OptunaSearch
from rich.console import Console

from pipelines import build, compare, jobs, launch, population, sweep_plots, tracking, tuner
from pipelines.config import Config
from pipelines.recipe import parse, replaced, to_yaml
from pipelines.run_folder import RunFolder
from pipelines.spaces import Point, Space, own_point, points, space_of
from pipelines.trials import CLOCK, EPOCHS, SCORE, Options, Sweep, fold_values, run_final, run_trial, warm

SEARCHES, SCHEDULES = ("optuna", "random", "grid"), ("asha", "none", "pbt")


class Outcome(NamedTuple):
    """What `dml tune --json` prints.  tested: lines of `dml compare`, the defaults being the baseline."""

    sweep: str
    run_id: str
    winner: Point
    score: float
    recipe: str
    model: str | None
    trials: list[dict[str, Any]]
    tested: list[dict[str, Any]]
    warnings: list[str]
    seconds: float


def begin(config: Config, options: Options, console: Console) -> Outcome:
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
        population.scheduler(space, config, CLOCK, SCORE)
    if options.folds > 1:
        replaced(config, fold_values(0, options.folds))
    if config.name is None:
        parts = [config.data.name, options.space.replace(".py", "").replace("/", "-"), options.search]
        config = replaced(config, {"name": "-".join([*parts, datetime.now().strftime("%Y%m%d-%H%M%S")])})
    config = jobs.absolute(config)
    folder = RunFolder(config)
    if folder.read("sweep.json") or folder.read("run.json"):
        raise ValueError(
            f"name={config.name} is taken in {config.storage}; to continue a sweep: --resume {config.name}"
        )
    with console.status("reading the data"):
        unreadable = jobs.check.unreadable(config.data, console)
        splits = build.splits(config, unreadable)
        if splits.validation is None:
            raise ValueError("data.validation_fraction=0: a sweep chooses by validation classes")
    uri = tracking.default_uri(Path.cwd())
    tracking.prepare(uri)
    domains = {
        f"space.{key}": f"{type(d.get_sampler()).__name__.strip('_')} {d.domain_str}" for key, d in space.items()
    }
    tags = {"kind": "sweep", **{key: str(value) for key, value in options._asdict().items()}}
    run_id = jobs.start_run(uri, config, config.flat() | domains, tags, splits)
    sweep = Sweep(str(config.name), f"{config.storage}/{config.name}", uri, run_id, config, options)
    folder.write(
        "sweep.json",
        {
            "run_id": run_id,
            "uri": tracking.shown(uri),
            "options": options._asdict(),
            "config": config.model_dump(exclude_none=True),
        },
    )
    return _sweep(sweep, space, folder, console)


def resume(name: str, storage: str, console: Console) -> Outcome:
    """Go on with a sweep that was killed or stopped, or repeat the outcome of one that finished."""
    config = jobs.absolute(replaced(Config(), {"name": name, "storage": storage}))
    folder = RunFolder(config)
    if (begun := folder.read("sweep.json")) is None:
        raise ValueError(f"--resume {name}: no sweep of that name in {storage}; storage=FOLDER says where")
    if outcome := folder.read("outcome.json"):
        console.print(f"{name} is finished; this is its outcome")
        return Outcome(**outcome)
    options = Options(**begun["options"])
    config, space = space_of(options.space, parse(begun["config"]))
    uri, own = begun["uri"], tracking.default_uri(Path.cwd())
    if tracking.shown(own) == uri:
        uri = own  # with its password, which is kept nowhere
    tracking.prepare(uri)
    tracking.resume_run(uri, begun["run_id"], {})
    sweep = Sweep(name, f"{config.storage}/{name}", uri, begun["run_id"], config, options)
    return _sweep(sweep, space, folder, console)


def _sweep(sweep: Sweep, space: Space, folder: RunFolder, console: Console) -> Outcome:
    started, status, config = time.monotonic(), "FAILED", sweep.config
    here = config.worker_range[1] == 1
    console.print(f"{sweep.folder}  (if interrupted: dml tune --resume {sweep.name})", highlight=False)
    cpus = (sweep.options.concurrent or 1) * config.worker_range[1] + (not here)
    try:
        with launch.cluster(config, folder.logs, cpus, dashboard=not here):
            places = tuner.places(sweep, here, console)
            if config.backbone.frozen:
                with console.status("features of the frozen backbone, for all trials"):
                    job = {"unreadable": jobs.check.unreadable(config.data, console)}
                    launch.run_here(warm, launch.resolve_devices(config, here=True), job)
            trials = _search(places, space)
            finished = [trial for trial in trials if trial.ended == "finished"]
            if not finished:
                raise launch.RunFailed(f"none of {len(trials)} trials finished; {trials[0].reason}")
            best = max(finished, key=lambda trial: trial.score or 0.0)
            winner = replaced(config, {**best.point, "name": None, "storage": "runs"})
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
            jobs.settle(sweep.uri, sweep.run_id, sweep.folder)
        tracking.end_run(sweep.uri, sweep.run_id, status)
    outcome = Outcome(
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


def _search(places: tuner.Places, space: Space) -> list[tuner.Trial]:
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
        listed = points(space, options.search, options.samples, sweep.config)
        search, searched, count = None, tune.grid_search(listed), len(listed)
    scheduler: Any = None
    if options.schedule == "pbt":
        scheduler = population.scheduler(space, sweep.config, CLOCK, SCORE)
    if options.schedule == "asha":
        # The last report comes at `total`; what reaches it is to end by itself.
        grace = max(sweep.config.evaluate_every, total // 9, 1)
        scheduler = AsyncHyperBandScheduler(
            EPOCHS, SCORE, "max", max_t=total + 1, grace_period=grace, reduction_factor=3
        )
    trials = tuner.fit(places, "search", run_trial, {"point": searched}, count, search, scheduler)
    return [tuner.read(trial, total) for trial in trials]


def _log(sweep: Sweep, space: Space, trials: list[tuner.Trial], best: tuner.Trial, winner: Config) -> None:
    """What the search found, to MLflow: before the tests, which take long."""
    for name, figure in sweep_plots.figures(space, trials).items():
        tracking.log_figure(sweep.uri, sweep.run_id, figure, f"{name}.png")
    tracking.log_text(sweep.uri, sweep.run_id, to_yaml(winner), "best.yaml")
    tracking.log_metrics(sweep.uri, sweep.run_id, {"val/best_map_at_r": best.score or 0.0})


def _finals(places: tuner.Places, winner: Point, own: Point | None) -> list[dict[str, Any]]:
    """Tested runs of the winner, first, and of the defaults, over the same seeds, none of them that of the search."""
    sweep = places.sweep
    settings = {"default": {}} if winner == own else {"winner": winner, "default": {}}
    seeds = range(sweep.config.seed + 1, sweep.config.seed + 1 + sweep.options.final_seeds)
    listed = [(who, seed, values) for seed in seeds for who, values in settings.items()]
    found = []
    for trial in tuner.fit(places, "final", run_final, {"point": tune.grid_search(listed)}, len(listed)):
        if trial.status != tuner.RayTrial.TERMINATED:
            raise launch.RunFailed(f"a final run failed: {tuner.why(trial)}")
        found.append({"who": trial.config["point"][0], **trial.last_result})
    return sorted(found, key=lambda final: final["who"] == "default")


def _tested(sweep: Sweep, finals: list[dict[str, Any]]) -> tuple[compare.Comparison, str | None]:
    """The tested runs compared, and the winner's best model, which becomes the champion."""
    runs = tracking.read_runs(sweep.uri, [final["run_id"] for final in finals])
    baseline = next(final["run_id"] for final in finals if final["who"] == "default")
    labels = {run.group: run.name.rpartition("-s")[0] for run in runs}
    found = compare.comparison(runs, sweep.name, baseline, compare.METRICS, labels)
    tracking.log_text(sweep.uri, sweep.run_id, found.page, "comparison.html")
    model = max((f for f in finals if f["who"] == finals[0]["who"]), key=lambda f: f[SCORE])["model"]
    if model:
        tracking.set_alias(sweep.uri, model, "champion")
    return found, model or None
