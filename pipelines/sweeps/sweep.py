"""`dml tune`: a search of settings on validation classes, then the winner beside the defaults on the test classes.

Ray Tune draws the points and ends what falls behind. Nothing of the test classes is seen before the winner is known.
"""

import logging
import re
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pyarrow.fs
from ray import tune
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from rich.console import Console

from pipelines.cluster.address import require_cluster
from pipelines.cluster.devices import resolve_devices, resolve_workers
from pipelines.cluster.failures import remedy_of
from pipelines.cluster.in_process import run_in_process
from pipelines.cluster.session import open_cluster
from pipelines.compare.page import render_comparison
from pipelines.compare.statistics import METRICS, Comparison, compare_runs
from pipelines.config.identity import with_absolute_paths
from pipelines.config.recipe import load_recipe, parse_assignments, parse_stored_config, to_yaml, with_values
from pipelines.config.schema import AUTO, Config
from pipelines.console import RunFailed, messages, print_notes
from pipelines.data.check import identify_again, unreadable_pictures
from pipelines.data.sets import cache_folder, identify, load_splits
from pipelines.kept import keep_meanwhile
from pipelines.models.build import build_learner
from pipelines.models.checkpoint import read_history
from pipelines.models.run_folder import RunFolder, local_copy, newest_checkpoint
from pipelines.models.start import FOLDER as START_FOLDER
from pipelines.models.start import OpenStart, keep_start, open_start
from pipelines.pages.render import made_by
from pipelines.runs.log import logged_to
from pipelines.runs.record import Lineage, record_run, with_experiment
from pipelines.runs.start import check_start
from pipelines.sweeps.features import FeaturesJob
from pipelines.sweeps.plots import draw_figures
from pipelines.sweeps.population import make_pbt_scheduler
from pipelines.sweeps.records import (
    EPOCHS,
    SCORE,
    FinalRun,
    FinalTask,
    Sweep,
    SweepOptions,
    SweepOutcome,
    Trial,
    fold_values,
)
from pipelines.sweeps.search import NumberedOptuna
from pipelines.sweeps.spaces import Point, Space, config_point, draw_points, load_space, most_epochs
from pipelines.sweeps.stages import Placement, failure_reason, place_trials, read_trial, run_stage
from pipelines.sweeps.trial import run_final, run_trial
from pipelines.tracking.address import database_file, default_uri, without_password
from pipelines.tracking.models import set_alias
from pipelines.tracking.process import SameProcess
from pipelines.tracking.runs import end_run, log_figure, log_metrics, log_text, read_runs, resume_run, running_children
from pipelines.tracking.sender import MetricSender
from pipelines.tracking.server import prepare_run

LOGGER = logging.getLogger(__name__)


def start_sweep(
    recipe: str,
    assignments: Sequence[str] | Mapping[str, Any],
    options: SweepOptions,
    console: Console = messages,
) -> SweepOutcome:
    """Search settings, then test the winner and the config's own settings over the same seeds.

    Args:
        recipe: A recipe's name or YAML file.
        assignments: Config values on top of it, as for config.recipe.load_recipe. Unless they name a number of
            `workers`, each trial has one: more trials run beside each other, and nothing is sent between processes.
        options: The rest of what the sweep is.
        console: Where messages and progress go.

    Raises:
        ValueError: Bad input, before any trial.
        RunFailed: The search or a final run failed.
        KeyboardInterrupt: The sweep was stopped; resume_sweep goes on.
    """
    require_cluster()
    config = load_recipe(recipe, {"workers": 1} | parse_assignments(assignments))
    config, _ = resolve_workers(config, here=True)
    options = options.resolve()
    config, space = load_space(options.space, config)
    _check_options(config, space, options)
    if config.name is None:
        config = with_values(config, {"name": default_name(config, options)})
    config = with_experiment(with_absolute_paths(config), None)
    folder = RunFolder(config)
    if folder.read("sweep.json") or folder.read("run.json"):
        raise ValueError(
            f"name={config.name} is taken in {config.storage}; to continue a sweep: --resume {config.name}"
        )
    config, start = open_start(config, folder, None)
    if start:
        if fixed := sorted({"backbone.name", "backbone.weights", "embedding_dim", "start_from"} & {*space}):
            raise ValueError(f"{fixed[0]} cannot be searched: {start.key} decides it")
        config = with_values(config, {start.key: f"{config.storage}/{config.name}/{START_FOLDER}"})
    sweep = _record_sweep(config, space, options, start, console)
    if start:
        keep_start(folder, start)
    begun = {"run_id": sweep.run_id, "uri": without_password(sweep.uri), "options": options._asdict()}
    begun |= {"data": sweep.data._asdict()}
    folder.write("sweep.json", begun | {"config": config.model_dump(exclude_none=True)})
    return _run_sweep(sweep, space, folder, console)


def default_name(config: Config, options: SweepOptions) -> str:
    """Name a sweep by its set, its spaces (of a file by the file's name), its search and the time."""
    spaces = "-".join(re.sub(r"\W+", "-", Path(space).stem) for space in options.space.split("+"))
    return "-".join([config.data.name, spaces, str(options.search), datetime.now().strftime("%Y%m%d-%H%M%S")])


def resume_sweep(name: str, storage: str = "runs", console: Console = messages) -> SweepOutcome:
    """Go on with a sweep that was killed or stopped, or repeat the outcome of one that finished.

    Args:
        name: Of the sweep, which knows all else.
        storage: Where its folder is.
        console: Where messages and progress go.

    Raises:
        ValueError, RunFailed, KeyboardInterrupt: See start_sweep.
    """
    try:
        config = with_absolute_paths(with_values(Config(), {"name": name, "storage": storage}))
    except ValueError as error:
        raise ValueError(str(error).replace("name=", "--resume ", 1)) from None
    folder = RunFolder(config)
    if (begun := folder.read("sweep.json")) is None:
        raise ValueError(f"--resume {name}: no sweep of that name in {storage}; storage=FOLDER says where")
    stored = parse_stored_config(begun["config"])
    data = identify_again(stored.data, f"--resume {name}", begun, folder.path, console)
    if outcome := folder.read("outcome.json"):
        console.print(f"{name} is finished; this is its outcome")
        return SweepOutcome.from_json(outcome)
    require_cluster()
    options = SweepOptions(**begun["options"])
    config, space = load_space(options.space, stored)
    config = with_experiment(config, begun["config"])
    uri, default = begun["uri"], default_uri(Path.cwd())
    database = database_file(uri)
    if without_password(default) == uri or (database and not database.exists()):
        uri = default  # with its password, which is kept nowhere; or the project's folder has moved
    prepare_run(uri, str(config.experiment), begun["run_id"], "another name= starts a new sweep")
    resume_run(uri, begun["run_id"], {})
    sweep = Sweep(name, f"{config.storage}/{name}", uri, begun["run_id"], config, data, options)
    return _run_sweep(sweep, space, folder, console)


def _check_options(config: Config, space: Space, options: SweepOptions) -> None:
    """Raise ValueError for options that do not fit each other or the config."""
    if options.schedule == "pbt":
        if options.search != "random" or options.folds > 1 or config.worker_range[1] > 1:
            raise ValueError("--schedule pbt: it goes with --search random, --folds 1 and workers=1")
        if config.changes:
            raise ValueError("--schedule pbt: it finds `changes`, and cannot begin with some")
        make_pbt_scheduler(space, config)
    if options.folds > 1:
        with_values(config, fold_values(0, options.folds))


def _record_sweep(
    config: Config, space: Space, options: SweepOptions, start: OpenStart | None, console: Console
) -> Sweep:
    """Read the data once and start the sweep's run in MLflow."""
    uri = default_uri(Path.cwd())
    with console.status("preparing MLflow's store"):
        prepare_run(uri, str(config.experiment))
    with keep_meanwhile(), console.status("reading the data"):
        data = identify(config.data, partial(console.print, highlight=False, markup=False, soft_wrap=True))
        unreadable = unreadable_pictures(config.data, data, console)
        splits = load_splits(config, unreadable)
        print_notes(console, splits.notes)
        if splits.validation is None:
            raise ValueError("data.validation_fraction=0: a sweep chooses by validation classes")
        if options.folds > 1:  # refused here, not in every trial, where the set itself says what is validated on
            load_splits(with_values(config, fold_values(0, options.folds)), unreadable)
    lineage = None
    if start:
        learner = build_learner(config, len(splits.train.class_names), read_weights=False)
        lineage = Lineage(start, check_start(start, learner, config, splits, console))
    domains = {
        f"space.{key}": f"{type(d.get_sampler()).__name__.strip('_')} {d.domain_str}" for key, d in space.items()
    }
    tags = {"kind": "sweep", **{key: str(value) for key, value in options._asdict().items()}}
    params = config.flat() | domains | (lineage.params if lineage else {})
    run_id = record_run(SameProcess(), uri, config, params, tags | (lineage.tags if lineage else {}), data)
    return Sweep(str(config.name), f"{config.storage}/{config.name}", uri, run_id, config, data, options)


def _run_sweep(sweep: Sweep, space: Space, folder: RunFolder, console: Console) -> SweepOutcome:
    """Run what a sweep lacks, end its run in MLflow as it ended, and keep its outcome."""
    status = "FAILED"
    console.print(f"{sweep.folder}  (if interrupted: dml tune --resume {sweep.name})", highlight=False)
    with logged_to(folder.logs or cache_folder() / "logs" / sweep.name) as log:
        try:
            outcome, finals = _search_and_test(sweep, space, folder, console, log)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            try:
                end_interrupted_runs(sweep.uri, sweep.run_id, sweep.folder)
            except Exception as error:  # a server that is gone must not hide what happened
                LOGGER.exception("ending the sweep's interrupted runs in MLflow failed")
                _warn(console, "MLflow may still show interrupted trials as running", error, log)
            end_run(sweep.uri, sweep.run_id, status)
    folder.write("outcome.json", outcome.to_json())
    folder.delete_checkpoints(except_of={final.name for final in finals})
    return outcome


def _search_and_test(
    sweep: Sweep, space: Space, folder: RunFolder, console: Console, log: Path
) -> tuple[SweepOutcome, list[FinalRun]]:
    """Run the two stages of a sweep. log: where tracebacks go."""
    started, config = time.monotonic(), sweep.config
    in_process = config.worker_range[1] == 1
    cpus = (sweep.options.concurrent or 1) * config.worker_range[1] + (not in_process)
    with open_cluster(config, folder.logs, cpus, dashboard=not in_process):
        placement = place_trials(sweep, in_process, console)
        if config.backbone.frozen:
            with console.status("features of the frozen backbone, for all trials"):
                unreadable = unreadable_pictures(config.data, sweep.data, console)
                run_in_process(FeaturesJob(resolve_devices(config, here=True), unreadable, sweep.data), console)
        trials = _search(placement, space)
        finished = [trial for trial in trials if trial.ended == "finished"]
        if not finished:
            raise RunFailed(f"none of {len(trials)} trials finished; {trials[0].reason}")
        best = max(finished, key=lambda trial: trial.score or 0.0)
        free = {"name": None, "storage": "runs", "experiment": None, "workers": AUTO, "batch.slices": config.slices}
        recipe = to_yaml(with_values(config, {**best.point, **free}))
        folder.write("best.yaml", recipe)
        try:
            for name, figure in draw_figures(space, trials).items():
                log_figure(sweep.uri, sweep.run_id, figure, f"{name}.png")
        except Exception as error:  # the numbers are what counts
            LOGGER.exception("drawing or keeping the sweep's plots failed")
            _warn(console, "plots of the sweep are missing in MLflow", error, log)
        log_text(sweep.uri, sweep.run_id, recipe, "best.yaml")
        log_metrics(sweep.uri, sweep.run_id, {"val/best_map_at_r": best.score or 0.0})
        finals = _run_finals(placement, best.point, config_point(config, space)) if sweep.options.final_seeds else []
    comparison, model = _compare_finals(sweep, finals) if finals else (Comparison("default", [], []), None)
    outcome = SweepOutcome(
        sweep=sweep.name,
        run_id=sweep.run_id,
        winner=best.point,
        score=best.score or 0.0,
        recipe=f"{folder.path}/best.yaml",
        model=model,
        trials=trials,
        tested=comparison.lines,
        warnings=comparison.warnings,
        seconds=time.monotonic() - started,
    )
    return outcome, finals


def _search(placement: Placement, space: Space) -> list[Trial]:
    sweep, options = placement.sweep, placement.sweep.options
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    points: Mapping[str, object]
    if options.search == "optuna":
        own = config_point(sweep.config, space)
        first = [] if own is None else [{f"point/{key}": value for key, value in own.items()}]
        search = NumberedOptuna(metric=SCORE, mode="max", seed=sweep.config.seed, points_to_evaluate=first or None)
        points, count = space, options.samples
    else:
        drawn = draw_points(space, str(options.search), options.samples, sweep.config)
        search, points, count = None, tune.grid_search(drawn), len(drawn)
    scheduler: TrialScheduler | None = None
    if options.schedule == "pbt":
        scheduler = make_pbt_scheduler(space, sweep.config)
    if options.schedule == "asha":
        # The last report comes at `total` at the latest; what reaches it is to end by itself.
        total = options.folds * most_epochs(space, sweep.config)
        grace = max(sweep.config.evaluate_every, total // 9, 1)
        scheduler = AsyncHyperBandScheduler(
            EPOCHS, SCORE, "max", max_t=total + 1, grace_period=grace, reduction_factor=3
        )
    trials = run_stage(placement, "search", run_trial, points, count, search, scheduler)
    return [read_trial(trial, sweep) for trial in trials]


def _run_finals(placement: Placement, winner: Point, own: Point | None) -> list[FinalRun]:
    """Train and test the winner and the defaults over the same seeds, none of them that of the search.

    Args:
        placement: Where the runs are made.
        winner: Settings of the best trial.
        own: The config's own settings; the winner's runs are not made where they are the same.

    Returns:
        The winner's runs, then those of the defaults.
    """
    sweep = placement.sweep
    settings: dict[str, Point] = {"default": {}} if winner == own else {"winner": winner, "default": {}}
    seeds = range(sweep.config.seed + 1, sweep.config.seed + 1 + sweep.options.final_seeds)
    tasks = [FinalTask(role=role, seed=seed, settings=point) for seed in seeds for role, point in settings.items()]
    finals = []
    for trial in run_stage(placement, "final", run_final, tune.grid_search(tasks), len(tasks)):
        if trial.status != RayTrial.TERMINATED:
            reason = failure_reason(trial)
            remedy = remedy_of(reason)
            raise RunFailed(f"a final run failed: {reason}", goes_on=remedy is None or remedy.goes_on)
        report = trial.last_result  # a FinalReport and Ray Tune's own
        role = trial.config["point"]["role"]
        finals.append(FinalRun(role, report["score"], report["name"], report["run_id"], report["model"]))
    return sorted(finals, key=lambda final: final.role == "default")


def _compare_finals(sweep: Sweep, finals: list[FinalRun]) -> tuple[Comparison, str | None]:
    """Compare the tested runs, and make the winner's best model the champion. Return its NAME/VERSION, too."""
    runs = read_runs(sweep.uri, [final.run_id for final in finals])
    baseline = next(final.run_id for final in finals if final.role == "default")
    labels = {run.group: run.name.rpartition("-s")[0] for run in runs}
    comparison = compare_runs(runs, sweep.name, baseline, METRICS, labels)
    log_text(sweep.uri, sweep.run_id, render_comparison(sweep.name, comparison, made_by("dml tune")), "comparison.html")
    model = max((final for final in finals if final.role == finals[0].role), key=lambda final: final.score).model
    if model:
        set_alias(sweep.uri, model, "champion")
    return comparison, model or None


def end_interrupted_runs(uri: str, parent: str, storage: str) -> None:
    """End the runs of a sweep that were interrupted: MLflow gets what they reached, and takes them for running no more.

    Args:
        uri: MLflow's store.
        parent: The sweep's run.
        storage: The sweep's folder, which holds those of its runs.
    """
    for run in running_children(uri, parent):
        files, root = pyarrow.fs.FileSystem.from_uri(storage)
        folder = f"{root}/{run.name}"
        if (newest := newest_checkpoint(files, folder)) is not None:
            with local_copy(files, f"{folder}/{newest}") as local:
                sender = MetricSender(SameProcess(), uri, run.run_id)
                for record in read_history(local):
                    sender.log(record)
                sender.close()
        end_run(uri, run.run_id, "KILLED")


def _warn(console: Console, problem: str, error: Exception, log: Path) -> None:
    """Say in one line what went wrong without ending the sweep. log: has the traceback."""
    reason = without_password(str(error)).strip().partition("\n")[0] or type(error).__name__
    console.print(f"{problem}: {reason} ({log} has the traceback)", style="yellow", highlight=False, markup=False)
