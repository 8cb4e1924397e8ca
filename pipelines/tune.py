"""`dml tune`: a search of settings on validation classes, then the winner beside the defaults on the test classes.

A trial is a run of `dml train` by a name of its own in the sweep's folder, without its test: what was interrupted goes
on by its name, and what is finished is not trained again, whatever Ray Tune remembers of it. Ray Tune draws the points,
deals them to the machine and ends what falls behind. Nothing of the test classes is seen before the winner is known.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import logging
import os
import statistics
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "2")  # what a killed sweep has forgotten at most
os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "60")  # for a trial that is ended to leave its epoch
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # tables between our own lines, whatever `verbose` says
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")

import numpy as np
import optuna
import ray
from ray import tune
from ray.tune.experiment import Trial as RayTrial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.sample import Categorical, Domain, Float, Integer, LogUniform
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dml_core import base_losses
from pipelines import build, compare, evaluate, jobs, launch, sweep_plots, tracking
from pipelines.config import METHODS, Config
from pipelines.progress import Reporter
from pipelines.recipe import parse, replaced, to_yaml

SPACES = ("base", *METHODS)
SEARCHES, SCHEDULES = ("optuna", "random", "grid"), ("asha", "none")
SCORE, EPOCHS, FAILED = "score", "epochs_done", "failed"
logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what fails is told by us
RETRIES = 2  # of a trial whose process is lost
Space = dict[str, Domain]
Point = dict[str, Any]


class Options(NamedTuple):
    """What a sweep is, beside the config it starts from.

    space: names of tune_spaces joined by +, or a FILE.py with a SPACE.  samples: points; of a grid, on each range.
    concurrent: trials at a time; None: as many as fit.  folds: trainings of a point, on other validation classes each.
    final_seeds: test runs of the winner, and as many of the defaults.
    """

    space: str
    samples: int = 32
    concurrent: int | None = None
    search: str = "optuna"
    schedule: str = "asha"
    folds: int = 1
    final_seeds: int = 5


class Trial(NamedTuple):
    """score: mean over folds of the best val/map_at_r; None where there is none.  ended: finished, stopped, failed."""

    name: str
    point: Point
    score: float | None
    epochs: int
    ended: str
    reason: str


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


class Sweep(NamedTuple):
    """A sweep under way.  folder: storage/NAME, holding all its runs.  uri, run_id: of MLflow, the parent run."""

    name: str
    folder: str
    uri: str
    run_id: str
    config: Config
    options: Options


# The space


def space_of(names: str, config: Config) -> tuple[Config, Space]:
    """The space, and the config with the methods that it is of. ValueError for a space or a key that there is not."""
    space: Space = {}
    for name in names.split("+"):
        for part in SPACES if name == "all" else (name,):
            space |= _module_space(part, names, config.loss.name)
    searched = {key.partition(".")[0] for key in space}
    config = replaced(config, {"method": [m for m in METHODS if m in config.method or m in searched]})
    for corner in _corners(space):
        try:
            replaced(config, corner)
        except ValueError as error:
            raise ValueError(f"--space {names}: {error}") from None
    return config, space


def _module_space(part: str, names: str, loss: str) -> Space:
    if part in SPACES:
        module = importlib.import_module(f"tune_spaces.{part}")
        return module.SPACE | getattr(module, "LOSSES", {}).get(loss, {})
    if not part.endswith(".py"):
        raise ValueError(f"--space {names}: {part!r} is none of {', '.join(SPACES)}, all, FILE.py")
    spec = importlib.util.spec_from_file_location("space_of_a_file", part)
    if spec is None or spec.loader is None or not Path(part).is_file():
        raise ValueError(f"--space {names}: {part}: no such file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    space = getattr(module, "SPACE", None)
    if not isinstance(space, dict) or not space or not all(isinstance(d, Domain) for d in space.values()):
        raise ValueError(f"--space {names}: {part} has no SPACE of dotted keys and Ray Tune's domains")
    return space


def _levels(domain: Domain, count: int) -> list[Any]:
    """So many values of a range, its ends among them; of a choice all values."""
    if isinstance(domain, Categorical):
        return list(domain.categories)
    assert isinstance(domain, Float | Integer)
    spread = np.geomspace if isinstance(domain.get_sampler(), LogUniform) else np.linspace
    if isinstance(domain, Float):
        return [min(max(v, domain.lower), domain.upper) for v in spread(domain.lower, domain.upper, count).tolist()]
    return sorted({round(v) for v in spread(domain.lower, domain.upper - 1, count).tolist()})


def _corners(space: Space) -> Iterator[Point]:
    """Each range's ends and each choice, one after the other, the rest at its first value."""
    ends = {key: _levels(domain, 2) for key, domain in space.items()}
    first = {key: values[0] for key, values in ends.items()}
    for key, values in ends.items():
        for value in values:
            yield first | {key: value}


def own_point(config: Config, space: Space) -> Point | None:
    """The config's own settings as a point of the space; None where they lie outside."""
    known = {f"loss.{key}": value for key, value in base_losses.arguments(config.loss.name).items()} | config.flat()
    point = {key: known.get(key) for key in space}
    for key, domain in space.items():
        value = point[key]
        if value is None and not isinstance(domain, Categorical):
            return None
        if not domain.is_valid(value):
            return None
    return point


def points(space: Space, options: Options, config: Config) -> list[Point]:
    """Of a random search, the config's own first, or of a grid. The same for the same seed."""
    if options.search == "grid":
        values = [_levels(domain, options.samples) for domain in space.values()]
        return [dict(zip(space, chosen, strict=True)) for chosen in itertools.product(*values)]
    random = np.random.RandomState(config.seed)
    own = own_point(config, space)
    found = [] if own is None else [own]
    while len(found) < options.samples:
        drawn = {key: domain.sample(random_state=random) for key, domain in space.items()}
        found.append({k: v.item() if isinstance(v, np.generic) else v for k, v in drawn.items()})
    return found


# In a trial's process

QUIET = Console(file=io.StringIO())


def run_trial(config: dict[str, Any], sweep: Sweep, here: bool) -> None:
    """One point, fold after fold, each a run by a name of its own. Reports the mean of the folds' best so far."""
    point, folds, bests = config["point"], sweep.options.folds, list[float]()
    base, name = replaced(sweep.config, point), trial_name(tune.get_context().get_trial_id(), point)
    for fold in range(folds):
        values = _place(sweep, name, fold) | (_fold(fold, folds) if folds > 1 else {})
        progress = _Progress([*bests], fold * base.epochs)
        part = jobs.Part(sweep.uri, sweep.run_id, {"trial": name, "fold": str(fold)}, False, progress.report)
        try:
            part = part if here else part._replace(callbacks=[Relay(progress)])
            outcome = jobs.train(replaced(base, values), QUIET, here, part)
        except launch.RunFailed as error:
            # Again it would fail again. To the search it is the worst that there is.
            tune.report({SCORE: 0.0, EPOCHS: fold * base.epochs, FAILED: str(error)})
            return
        bests.append(outcome.metrics["val/best_map_at_r"])
    tune.report({SCORE: statistics.mean(bests), EPOCHS: folds * base.epochs})


class _Progress(NamedTuple):
    """Of a fold, in the terms of its trial: the best scores of the folds before, and their epochs."""

    bests: list[float]
    epochs: int

    def told(self, metrics: dict[str, Any]) -> dict[str, Any]:
        score = statistics.mean([*self.bests, metrics["val/best_map_at_r"]])
        return {SCORE: score, EPOCHS: self.epochs + metrics["epoch"]}

    def report(self, metrics: dict[str, Any]) -> None:
        tune.report(self.told(metrics))


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
    tune.report({SCORE: outcome.metrics["val/best_map_at_r"], "run_id": outcome.run_id, "model": outcome.model or ""})


def trial_name(trial_id: str, point: Point) -> str:
    """Its number, and its settings: a number that a killed sweep gave twice does not mix two points."""
    digest = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:6]
    return f"t{trial_id.rpartition('_')[2]}-{digest}"


def _place(sweep: Sweep, trial: str, fold: int) -> dict[str, Any]:
    return {"name": f"{trial}-f{fold}" if sweep.options.folds > 1 else trial, "storage": sweep.folder}


def _fold(fold: int, folds: int) -> dict[str, Any]:
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


# In the driver


def begin(config: Config, options: Options, console: Console) -> Outcome:
    """A new sweep. ValueError: bad input, before any trial. launch.RunFailed, KeyboardInterrupt: on the way."""
    for option, value, known in (("search", options.search, SEARCHES), ("schedule", options.schedule, SCHEDULES)):
        if value not in known:
            raise ValueError(f"--{option} {value}: {', '.join(known[:-1])} or {known[-1]}")
    config, space = space_of(options.space, config)
    if options.folds > 1:
        replaced(config, _fold(0, options.folds))
    if config.name is None:
        parts = [config.data.name, options.space.replace(".py", "").replace("/", "-"), options.search]
        config = replaced(config, {"name": "-".join([*parts, datetime.now().strftime("%Y%m%d-%H%M%S")])})
    config = jobs.absolute(config)
    folder = jobs.RunFolder(config)
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
        {"run_id": run_id, "uri": uri, "options": options._asdict(), "config": config.model_dump(exclude_none=True)},
    )
    return _sweep(sweep, space, folder, console)


def resume(name: str, storage: str, console: Console) -> Outcome:
    """Go on with a sweep that was killed or stopped, or repeat the outcome of one that finished."""
    config = jobs.absolute(replaced(Config(), {"name": name, "storage": storage}))
    folder = jobs.RunFolder(config)
    if (begun := folder.read("sweep.json")) is None:
        raise ValueError(f"--resume {name}: no sweep of that name in {storage}; storage=FOLDER says where")
    if outcome := folder.read("outcome.json"):
        console.print(f"{name} is finished; this is its outcome")
        return Outcome(**outcome)
    options = Options(**begun["options"])
    config, space = space_of(options.space, parse(begun["config"]))
    tracking.prepare(begun["uri"])
    tracking.resume_run(begun["uri"], begun["run_id"], {})
    sweep = Sweep(name, f"{config.storage}/{name}", begun["uri"], begun["run_id"], config, options)
    return _sweep(sweep, space, folder, console)


def _sweep(sweep: Sweep, space: Space, folder: jobs.RunFolder, console: Console) -> Outcome:
    started, status = time.monotonic(), "FAILED"
    config, options = sweep.config, sweep.options
    here = config.worker_range[1] == 1
    console.print(f"{sweep.folder}  (if interrupted: dml tune --resume {sweep.name})", highlight=False)
    cpus = (options.concurrent or 1) * config.worker_range[1] + (not here)
    try:
        with launch.cluster(config, folder.logs, cpus, dashboard=not here):
            at_once, resources = _places(sweep, here, console)
            if config.backbone.frozen:
                with console.status("features of the frozen backbone, for all trials"):
                    job = {"unreadable": jobs.check.unreadable(config.data, console)}
                    launch.run_here(warm, launch.resolve_devices(config, here=True), job)
            trials = _search(sweep, space, here, at_once, resources, console)
            finished = [trial for trial in trials if trial.ended == "finished"]
            if not finished:
                raise launch.RunFailed(f"none of {len(trials)} trials finished; {trials[0].reason}")
            best = max(finished, key=lambda trial: trial.score or 0.0)
            figures = sweep_plots.figures(space, trials)
            for name, figure in figures.items():
                tracking.log_figure(sweep.uri, sweep.run_id, figure, f"{name}.png")
            winner = replaced(config, {**best.point, "name": None})
            recipe = f"{folder.path}/best.yaml"
            folder.write("best.yaml", to_yaml(replaced(winner, {"storage": "runs"})))
            tracking.log_text(sweep.uri, sweep.run_id, to_yaml(winner), "best.yaml")
            finals = _finals(sweep, best.point, own_point(config, space), here, at_once, resources, console)
        runs = tracking.read_runs(sweep.uri, [final["run_id"] for final in finals])
        baseline = next(final["run_id"] for final in finals if final["who"] == "default")
        labels = {run.group: run.name.rpartition("-s")[0] for run in runs}
        found = compare.comparison(runs, sweep.name, baseline, compare.METRICS, labels)
        tracking.log_text(sweep.uri, sweep.run_id, found.page, "comparison.html")
        model = max((f for f in finals if f["who"] == finals[0]["who"]), key=lambda f: f[SCORE])["model"]
        if model:
            tracking.set_alias(sweep.uri, model, "champion")
        tracking.log_metrics(sweep.uri, sweep.run_id, {"val/best_map_at_r": best.score or 0.0})
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
        recipe=recipe,
        model=model,
        trials=[trial._asdict() for trial in trials],
        tested=[line._asdict() for line in found.lines],
        warnings=found.warnings,
        seconds=time.monotonic() - started,
    )
    folder.write("outcome.json", outcome._asdict())
    for trial in trials:
        for fold in range(options.folds):
            jobs.RunFolder(replaced(config, _place(sweep, trial.name, fold))).forget()
    return outcome


def _places(sweep: Sweep, here: bool, console: Console) -> tuple[int, dict[str, float]]:
    """How many trials at a time, and what Ray sets aside for each. So many that their workers fit beside each other."""
    resources, workers = ray.cluster_resources(), sweep.config.worker_range[1]
    use_gpu = bool(launch.resolve_devices(sweep.config).use_gpu)
    kind = "GPU" if use_gpu else "CPU"
    fit = max(1, int(resources[kind] - (not here and not use_gpu)) // workers)
    at_once = min(sweep.options.concurrent or fit, fit)
    asked = sweep.options.concurrent
    console.print(
        f"{at_once} trials at a time, each on {workers} of {resources[kind]:g} {kind}s"
        + (f" (more than {fit} do not fit, the others wait)" if asked and asked > fit else ""),
        highlight=False,
    )
    if not here:
        return at_once, {"CPU": 0.01}  # its workers have their own
    return at_once, {"CPU": 1.0} | ({"GPU": 1.0} if use_gpu else {})


def _search(
    sweep: Sweep, space: Space, here: bool, at_once: int, resources: dict[str, float], console: Console
) -> list[Trial]:
    options, total = sweep.options, sweep.options.folds * sweep.config.epochs
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search, searched, samples = None, dict[str, Any](), options.samples
    if options.search == "optuna":
        own = own_point(sweep.config, space)
        known = [] if own is None else [{f"point/{key}": value for key, value in own.items()}]
        search = OptunaSearch(metric=SCORE, mode="max", seed=sweep.config.seed, points_to_evaluate=known or None)
        searched = {"point": space}
    else:
        listed = points(space, options, sweep.config)
        searched, samples = {"point": tune.grid_search(listed)}, 1
    scheduler: Any = FIFOScheduler()
    if options.schedule == "asha":
        # The last report comes at `total`; what reaches it is to end by itself.
        grace = max(sweep.config.evaluate_every, total // 9, 1)
        scheduler = AsyncHyperBandScheduler(
            EPOCHS, SCORE, "max", max_t=total + 1, grace_period=grace, reduction_factor=3
        )
    count = samples if search else len(listed)
    run = _Stage("search", run_trial, sweep, here, at_once, resources)
    return [_read(trial, total) for trial in _fit(run, searched, search, scheduler, samples, count, console)]


def _finals(
    sweep: Sweep,
    winner: Point,
    own: Point | None,
    here: bool,
    at_once: int,
    resources: dict[str, float],
    console: Console,
) -> list[dict[str, Any]]:
    """Tested runs of the winner, first, and of the defaults, over the same seeds, none of them that of the search."""
    settings = {"default": {}} if winner == own else {"winner": winner, "default": {}}
    seeds = range(sweep.config.seed + 1, sweep.config.seed + 1 + sweep.options.final_seeds)
    listed = [(who, seed, values) for seed in seeds for who, values in settings.items()]
    run = _Stage("final", run_final, sweep, here, at_once, resources)
    searched = {"point": tune.grid_search(listed)}
    found = []
    for trial in _fit(run, searched, None, FIFOScheduler(), 1, len(listed), console):
        if trial.status != RayTrial.TERMINATED:
            raise launch.RunFailed(f"a final run failed: {_why(trial)}")
        found.append({"who": trial.config["point"][0], **trial.last_result})
    return sorted(found, key=lambda final: final["who"] == "default")


class _Stage(NamedTuple):
    name: str
    function: Any
    sweep: Sweep
    here: bool
    at_once: int
    resources: dict[str, float]


def _fit(
    stage: _Stage, space: dict[str, Any], search: Any, scheduler: Any, samples: int, count: int, console: Console
) -> list[RayTrial]:
    """All trials of a stage, of one that was interrupted only what it lacks."""
    given = tune.with_parameters(stage.function, sweep=stage.sweep, here=stage.here)
    trainable = tune.with_resources(given, stage.resources)
    folder = f"{stage.sweep.folder}/tune_{stage.name}"
    if tune.Tuner.can_restore(folder):
        tuner = tune.Tuner.restore(folder, trainable, restart_errored=True, param_space=space)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                num_samples=samples,
                max_concurrent_trials=stage.at_once,
                search_alg=search,
                scheduler=scheduler,
                reuse_actors=stage.here,
            ),
            run_config=tune.RunConfig(
                name=f"tune_{stage.name}",
                storage_path=stage.sweep.folder,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                callbacks=[Watch()],
                verbose=0,
            ),
        )
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        Watch.bar, Watch.task = bar, bar.add_task(stage.name, total=count, facts="")
        try:
            results = launch.apart(tuner.fit)
        except tune.TuneError as error:
            raise launch.RunFailed(str(error).strip().splitlines()[-1]) from error
    return results._experiment_analysis.trials


class Watch(tune.Callback):
    """Shows how far the trials are. Ray pickles it with the sweep; what shows is the process's own."""

    bar: Progress
    task: Any

    def on_step_end(self, iteration: int, trials: list[RayTrial], **info: Any) -> None:
        ended = [trial for trial in trials if trial.is_finished()]
        scores = [t.last_result[SCORE] for t in trials if t.last_result and SCORE in t.last_result]
        failed = sum(t.status == RayTrial.ERROR or FAILED in (t.last_result or {}) for t in ended)
        facts = f"best {max(scores):.4f}" if scores else ""
        facts += f"  {failed} failed" if failed else ""
        Watch.bar.update(Watch.task, completed=len(ended), facts=facts)


def _read(trial: RayTrial, total: int) -> Trial:
    result = trial.last_result or {}
    point, score, epochs = trial.config["point"], result.get(SCORE), result.get(EPOCHS, 0)
    name = trial_name(trial.trial_id, point)
    if trial.status == RayTrial.ERROR:
        return Trial(name, point, None, epochs, "failed", _why(trial))
    if FAILED in result:
        return Trial(name, point, None, epochs, "failed", result[FAILED])
    return Trial(name, point, score, epochs, "finished" if epochs >= total else "stopped", "")


def _why(trial: RayTrial) -> str:
    lines = str(trial.get_error() or "").strip().splitlines()
    return lines[-1] if lines else f"ended as {trial.status}"
