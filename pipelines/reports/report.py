"""`dml report`: a run, a sweep or a comparison as one page. What it is of, what is on it, and where it goes."""

import json
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.fs
from rich.console import Console

from pipelines.cluster.devices import resolve_devices
from pipelines.cluster.launch import run_on_workers
from pipelines.cluster.session import open_cluster
from pipelines.cluster.transfer import put_files, scratch_storage
from pipelines.compare.comparison import keep_comparison, read_comparison
from pipelines.compare.page import render_comparison
from pipelines.compare.statistics import METRICS, Comparison, compare_runs
from pipelines.compare.wording import Line
from pipelines.config import schema
from pipelines.config.identity import FREE_KEYS, with_absolute_paths
from pipelines.config.recipe import parse_config, with_values
from pipelines.config.schema import Config
from pipelines.data import check
from pipelines.data.sets import load_splits
from pipelines.models import run_folder
from pipelines.models.checkpoint import MODEL_FILES, read_config, read_history, read_state
from pipelines.models.find import find_checkpoint
from pipelines.models.run_folder import local_copy, newest_checkpoint
from pipelines.pages.render import made_by
from pipelines.reports.inspection import inspect_loop
from pipelines.reports.page import render_run, render_sweep
from pipelines.sweeps.records import SweepOptions, Trial
from pipelines.sweeps.spaces import Space, space_of
from pipelines.tracking.runs import LoggedRun, find_run, log_text, read_runs
from pipelines.tracking.server import default_uri, prepare_store

MAY_DIFFER = {*FREE_KEYS, "precision", "data.on_bad_image", "data.table"} - {"name", "storage"}


class RunSubject(NamedTuple):
    """name: as it was given.  checkpoint: a folder here.  logged: MLflow's run of it, if it is known there."""

    name: str
    checkpoint: Path
    config: Config
    unreadable: list[str]
    logged: LoggedRun | None


class SweepSubject(NamedTuple):
    """outcome: what `dml tune --json` printed."""

    outcome: dict[str, Any]
    options: SweepOptions
    config: Config
    space: Space


class ComparisonSubject(NamedTuple):
    """A comparison. run_id: the MLflow run that `dml compare` has kept it in; None: it has been made now."""

    title: str
    run_id: str | None
    comparison: Comparison


Subject = RunSubject | SweepSubject | ComparisonSubject


def find_subject(names: Sequence[str], assignments: dict[str, Any], console: Console) -> Subject:
    """What a report is of. names: one run, sweep or comparison; or experiments.  assignments: config values of a run
    to replace. ValueError where there is no such thing, or where it is not finished."""
    uri = default_uri(Path.cwd())
    prepare_store(uri)
    name, local = names[0], "://" in names[0] or Path(names[0]).is_dir()
    logged = None if local or len(names) > 1 else find_run(uri, name)
    kind = logged.tags.get("kind", "run") if logged else ""
    found: Subject | None = None
    if logged and kind == "sweep":
        found = _sweep(f"{logged.params['storage']}/{logged.params['name']}")
    elif local and len(names) == 1:
        found = _sweep(name if "://" in name else str(Path(name).resolve()))
    elif kind == "comparison" and logged:
        found = ComparisonSubject("Comparison", logged.run_id, read_comparison(uri, logged.run_id))
    elif not logged and not name.startswith("models:/"):
        title = f"Comparison of {' and '.join(names)}"
        found = ComparisonSubject(title, None, compare_runs(read_runs(uri, names), title, None, METRICS))
    if found is None:
        return _run(uri, name, logged, schema.flatten(assignments), console)
    if assignments:
        raise ValueError(f"{next(iter(schema.flatten(assignments)))} cannot act on a report of a sweep or a comparison")
    return found


def _run(uri: str, name: str, logged: LoggedRun | None, values: dict[str, Any], console: Console) -> RunSubject:
    if unfit := sorted({*values} - MAY_DIFFER):
        raise ValueError(
            f"{unfit[0]} cannot act: a report is of the run as it is; {', '.join(sorted(MAY_DIFFER))} may differ"
        )
    folder = find_checkpoint(name)
    model = read_config(folder)
    if logged is None and (begun := _read(*run_folder.locate(model), "run.json")):
        logged = find_run(uri, begun["run_id"])
    # The pictures looked at are few: one worker does it, and the page does not depend on how many there are.
    config = with_absolute_paths(with_values(model, values | {"workers": 1}))
    unreadable = check.unreadable(config.data, console)
    with console.status("reading the data"):
        load_splits(config, unreadable)
    return RunSubject(name, folder, config, unreadable, logged)


def _sweep(place: str) -> SweepSubject | None:
    """Of a sweep's folder, or URL; None where it is not one."""
    try:
        files, path = pyarrow.fs.FileSystem.from_uri(place)
    except (OSError, ValueError) as error:
        raise ValueError(f"{place}: cannot be read ({str(error).splitlines()[0]})") from None
    if (begun := _read(files, path, "sweep.json")) is None:
        return None
    if (outcome := _read(files, path, "outcome.json")) is None:
        raise ValueError(f"{place}: the sweep has not finished; dml tune --resume {Path(path).name} goes on")
    options = SweepOptions(**begun["options"])
    config, space = space_of(options.space, parse_config(begun["config"]))
    return SweepSubject(outcome, options, config, space)


def _read(files: pyarrow.fs.FileSystem, folder: str, name: str) -> Any:
    """A JSON file of a run's or a sweep's folder; None where there is none."""
    try:
        with files.open_input_stream(f"{folder}/{name}") as file:
            return json.loads(file.read())
    except OSError:
        return None


def output_path(out: str) -> Path:
    """Where the page goes; it replaces an older one. ValueError where it cannot be written."""
    path = Path(out).expanduser().resolve()
    if path.suffix != ".html" or path.is_dir():
        raise ValueError(f"--out {out}: not the name of a file that ends with .html")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--out {out}: no folder {path.parent} that can be written to")
    return path


def write_report(found: Subject, path: Path, log: bool, console: Console) -> dict[str, Any]:
    """Make the page, and log it. Returns what `dml report --json` prints."""
    started, uri = time.monotonic(), default_uri(Path.cwd())
    made = made_by("dml report")
    if isinstance(found, RunSubject):
        kind, run_id, page = "run", found.logged and found.logged.run_id, _page_of_run(found, made, console)
    elif isinstance(found, SweepSubject):
        kind, run_id, page = "sweep", found.outcome["run_id"], _page_of_sweep(found, made)
    else:
        kind, run_id = "comparison", found.run_id
        page = render_comparison(found.title, found.comparison, made)
    partial = path.with_suffix(".html.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    if log and run_id:
        log_text(uri, run_id, page, "report.html")
    elif log and isinstance(found, ComparisonSubject):
        run_id = keep_comparison(uri, found.comparison, "report.html", page)
    facts = {"report": str(path), "kind": kind, "run_id": run_id, "logged": log and run_id is not None}
    return facts | {"bytes": path.stat().st_size, "seconds": time.monotonic() - started}


def _page_of_run(run: RunSubject, made: str, console: Console) -> str:
    logged, state = run.logged, read_state(run.checkpoint)
    numbers = logged.metrics if logged and "test/map_at_r" in logged.metrics else None
    with open_cluster(run.config, None), scratch_storage() as scratch:
        config = resolve_devices(run.config)
        job: dict[str, Any] = {"checkpoint": put_files(run.checkpoint, MODEL_FILES), "unreadable": run.unreadable}
        job |= {"numbers": numbers, "epoch": max(0, state.epoch - 1)}
        found: Any = run_on_workers(inspect_loop, config, job, scratch, "report", console)
    model = read_config(run.checkpoint)
    title = f"Run {logged.name if logged else model.name or run.name}"
    whence = "the run's own numbers" if numbers else "measured for this page, as MLflow does not know the run's numbers"
    environment = _environment(run, model)
    return render_run(title, model, found, _history(run), state.epoch, whence, environment, made)


def _history(run: RunSubject) -> list[dict[str, Any]]:
    """Of the run's last checkpoint where it is at hand; else of this one, which ends with it."""
    own = read_history(run.checkpoint)
    files, folder = run_folder.locate(read_config(run.checkpoint))
    try:
        newest = newest_checkpoint(files, folder)
    except OSError:
        newest = None
    if newest is None:
        return own
    with local_copy(files, f"{folder}/{newest}") as local:
        longer = read_history(local)
    return longer if longer[: len(own)] == own else own


def _environment(run: RunSubject, model: Config) -> dict[str, str]:
    tags = run.logged.tags if run.logged else {}
    known = {"run": run.logged.run_id if run.logged else "not known to MLflow", "checkpoint": str(run.checkpoint)}
    known |= {"commit of the training": tags.get("git_commit", "unknown")}
    known |= {"workers of the training": tags.get("workers", str(model.workers))}
    known |= {"device of the training": f"{'GPU' if model.use_gpu else 'CPU'}, {model.precision}"}
    known |= {"report made on": f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"}
    for package in (
        "dml-ray",
        "torch",
        "torchvision",
        "ray",
        "mlflow",
        "pytorch-metric-learning",
        "scikit-learn",
        "numpy",
    ):
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            known[package] = "not installed as a package"
    return known


def _page_of_sweep(sweep: SweepSubject, made: str) -> str:
    outcome, options = sweep.outcome, sweep.options
    comparison = Comparison("default", outcome["warnings"], [Line(**line) for line in outcome["tested"]])
    about = {"run": outcome["run_id"], "recipe of the winner": outcome["recipe"], "model": outcome["model"] or "none"}
    about |= {key.replace("_", " "): str(value) for key, value in options._asdict().items()}
    about |= {f"space of {key}": domain.domain_str for key, domain in sweep.space.items()}
    trials = [Trial(**trial) for trial in outcome["trials"]]
    return render_sweep(f"Sweep {outcome['sweep']}", trials, sweep.space, comparison, about, made)
