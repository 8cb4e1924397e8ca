"""`dml report`: a run, a sweep or a comparison as one page. What it is of, what is on it, and where it goes."""

import json
import os
import platform
import time
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.fs
from rich.console import Console

from pipelines import build, check, checkpoint, compare, embedder, jobs, launch, report_page, tracking
from pipelines.config import FREE, Config, flatten
from pipelines.findings import findings_loop
from pipelines.recipe import parse, replaced
from pipelines.report_page import Compared
from pipelines.spaces import Space, space_of
from pipelines.trials import Options
from pipelines.tuner import Trial

MAY_DIFFER = {*FREE, "precision", "data.on_bad_image", "data.table"} - {"name", "storage"}


class Run(NamedTuple):
    """name: as it was given.  checkpoint: a folder here.  logged: MLflow's run of it, if it is known there."""

    name: str
    checkpoint: Path
    config: Config
    unreadable: list[str]
    logged: tracking.LoggedRun | None


class Sweep(NamedTuple):
    """outcome: what `dml tune --json` printed."""

    outcome: dict[str, Any]
    options: Options
    config: Config
    space: Space


class Comparison(NamedTuple):
    """run_id: of the page of `dml compare`; None: made now, of an experiment of this id."""

    title: str
    run_id: str | None
    experiment: str
    compared: Compared


Subject = Run | Sweep | Comparison


def subject(names: Sequence[str], assignments: dict[str, Any], console: Console) -> Subject:
    """What a report is of. names: one run, sweep or comparison; or experiments.  assignments: config values of a run
    to replace. ValueError where there is no such thing, or where it is not finished."""
    uri = tracking.default_uri(Path.cwd())
    tracking.prepare(uri)
    name, local = names[0], "://" in names[0] or Path(names[0]).is_dir()
    logged = None if local or len(names) > 1 else tracking.find_run(uri, name)
    kind = logged.tags.get("kind", "run") if logged else ""
    found: Subject | None = None
    if logged and kind == "sweep":
        found = _sweep(f"{logged.params['storage']}/{logged.params['name']}")
    elif local and len(names) == 1:
        found = _sweep(name if "://" in name else str(Path(name).resolve()))
    elif kind == "comparison" and logged:
        kept = json.loads(tracking.read_text(uri, logged.run_id, "comparison.json"))
        lines = [compare.Line(**line) for line in kept["lines"]]
        found = Comparison(
            "Comparison", logged.run_id, logged.experiment, Compared(kept["baseline"], kept["warnings"], lines)
        )
    elif not logged and not name.startswith("models:/"):
        title = f"Comparison of {' and '.join(names)}"
        made = compare.comparison(tracking.read_runs(uri, names), title, None, compare.METRICS)
        found = Comparison(title, None, made.experiment, Compared(made.baseline, made.warnings, made.lines))
    if found is None:
        return _run(uri, name, logged, flatten(assignments), console)
    if assignments:
        raise ValueError(f"{next(iter(flatten(assignments)))} cannot act on a report of a sweep or a comparison")
    return found


def _run(uri: str, name: str, logged: tracking.LoggedRun | None, values: dict[str, Any], console: Console) -> Run:
    if unfit := sorted({*values} - MAY_DIFFER):
        raise ValueError(
            f"{unfit[0]} cannot act: a report is of the run as it is; {', '.join(sorted(MAY_DIFFER))} may differ"
        )
    folder = jobs.find_checkpoint(name)
    model = checkpoint.read_config(folder)
    if logged is None and (begun := _read(*checkpoint.run_folder(model), "run.json")):
        logged = tracking.find_run(uri, begun["run_id"])
    # The pictures looked at are few: one worker does it, and the page does not depend on how many there are.
    config = jobs.absolute(replaced(model, values | {"workers": 1}))
    unreadable = check.unreadable(config.data, console)
    with console.status("reading the data"):
        build.splits(config, unreadable)
    return Run(name, folder, config, unreadable, logged)


def _sweep(place: str) -> Sweep | None:
    """Of a sweep's folder, or URL; None where it is not one."""
    try:
        files, path = pyarrow.fs.FileSystem.from_uri(place)
    except (OSError, ValueError) as error:
        raise ValueError(f"{place}: cannot be read ({str(error).splitlines()[0]})") from None
    if (begun := _read(files, path, "sweep.json")) is None:
        return None
    if (outcome := _read(files, path, "outcome.json")) is None:
        raise ValueError(f"{place}: the sweep has not finished; dml tune --resume {Path(path).name} goes on")
    options = Options(**begun["options"])
    config, space = space_of(options.space, parse(begun["config"]))
    return Sweep(outcome, options, config, space)


def _read(files: pyarrow.fs.FileSystem, folder: str, name: str) -> Any:
    """A JSON file of a run's or a sweep's folder; None where there is none."""
    try:
        with files.open_input_stream(f"{folder}/{name}") as file:
            return json.loads(file.read())
    except OSError:
        return None


def target(out: str) -> Path:
    """Where the page goes; it replaces an older one. ValueError where it cannot be written."""
    path = Path(out).expanduser().resolve()
    if path.suffix != ".html" or path.is_dir():
        raise ValueError(f"--out {out}: not the name of a file that ends with .html")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--out {out}: no folder {path.parent} that can be written to")
    return path


def write(found: Subject, path: Path, log: bool, console: Console) -> dict[str, Any]:
    """Make the page, and log it. Returns what `dml report --json` prints."""
    started, uri = time.monotonic(), tracking.default_uri(Path.cwd())
    made = f"Made by dml report, {datetime.now():%Y-%m-%d %H:%M}."
    if isinstance(found, Run):
        kind, run_id, page = "run", found.logged and found.logged.run_id, _page_of_run(found, made, console)
    elif isinstance(found, Sweep):
        kind, run_id, page = "sweep", found.outcome["run_id"], _page_of_sweep(found, made)
    else:
        kind, run_id = "comparison", found.run_id
        page = report_page.of_comparison(found.title, found.compared, made)
    partial = path.with_suffix(".html.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    if log and run_id:
        tracking.log_text(uri, run_id, page, "report.html")
    elif log and isinstance(found, Comparison):
        kept = {**found.compared._asdict(), "lines": [line._asdict() for line in found.compared.lines]}
        texts = {"report.html": page, "comparison.json": json.dumps(kept, indent=1)}
        run_id = tracking.keep_page(uri, found.experiment, "comparison", texts)
    facts = {"report": str(path), "kind": kind, "run_id": run_id, "logged": log and run_id is not None}
    return facts | {"bytes": path.stat().st_size, "seconds": time.monotonic() - started}


def _page_of_run(run: Run, made: str, console: Console) -> str:
    logged, state = run.logged, checkpoint.read_state(run.checkpoint)
    numbers = logged.metrics if logged and "test/map_at_r" in logged.metrics else None
    with launch.cluster(run.config, None), launch.scratch_storage() as scratch:
        config = launch.resolve_devices(run.config)
        job: dict[str, Any] = {"checkpoint": launch.held(run.checkpoint, embedder.FILES), "unreadable": run.unreadable}
        job |= {"numbers": numbers, "epoch": max(0, state.epoch - 1)}
        found: Any = launch.run(findings_loop, config, job, scratch, "report", console)
    model = checkpoint.read_config(run.checkpoint)
    title = f"Run {logged.name if logged else model.name or run.name}"
    whence = "the run's own numbers" if numbers else "measured for this page, as MLflow does not know the run's numbers"
    environment = _environment(run, model)
    return report_page.of_run(title, model, found, _history(run), state.epoch, whence, environment, made)


def _history(run: Run) -> list[dict[str, Any]]:
    """Of the run's last checkpoint where it is at hand; else of this one, which ends with it."""
    own = checkpoint.read_history(run.checkpoint)
    files, folder = checkpoint.run_folder(checkpoint.read_config(run.checkpoint))
    try:
        newest = checkpoint.newest(files, folder)
    except OSError:
        newest = None
    if newest is None:
        return own
    with checkpoint.fetched(files, f"{folder}/{newest}") as local:
        longer = checkpoint.read_history(local)
    return longer if longer[: len(own)] == own else own


def _environment(run: Run, model: Config) -> dict[str, str]:
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


def _page_of_sweep(sweep: Sweep, made: str) -> str:
    outcome, options = sweep.outcome, sweep.options
    compared = Compared("default", outcome["warnings"], [compare.Line(**line) for line in outcome["tested"]])
    about = {"run": outcome["run_id"], "recipe of the winner": outcome["recipe"], "model": outcome["model"] or "none"}
    about |= {key.replace("_", " "): str(value) for key, value in options._asdict().items()}
    about |= {f"space of {key}": domain.domain_str for key, domain in sweep.space.items()}
    trials = [Trial(**trial) for trial in outcome["trials"]]
    return report_page.of_sweep(f"Sweep {outcome['sweep']}", trials, sweep.space, compared, about, made)
