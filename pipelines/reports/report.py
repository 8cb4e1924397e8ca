"""`dml report`: a run, a sweep or a comparison as one page. What it is of, what is on it, and where it goes."""

import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import pyarrow.fs
from rich.console import Console

from pipelines.compare.comparison import keep_comparison, read_comparison
from pipelines.compare.statistics import METRICS, Comparison, compare_runs
from pipelines.config import schema
from pipelines.config.identity import REPORT_KEYS
from pipelines.config.recipe import parse_stored_config
from pipelines.config.schema import Config
from pipelines.console import messages, stage
from pipelines.files import write_atomically
from pipelines.models import run_folder
from pipelines.models.checkpoint import read_data, read_history, read_state
from pipelines.models.find import find_checkpoint
from pipelines.models.run_folder import local_copy, newest_checkpoint, read_json
from pipelines.pages.render import made_by
from pipelines.reports.job import InspectJob
from pipelines.runs.with_model import TrainedModel, open_model, require_splits, run_with_model
from pipelines.tracking.address import default_uri
from pipelines.tracking.records import EpochRecord
from pipelines.tracking.runs import LoggedRun, find_run, log_text, read_runs
from pipelines.tracking.server import prepare_store

if TYPE_CHECKING:  # of sweeps; with them come Ray Tune and Optuna
    from pipelines.sweeps.records import SweepOptions, SweepOutcome
    from pipelines.sweeps.spaces import Space

# Whose versions a run's page names.
PACKAGES = ("dml-ray", "torch", "torchvision", "ray", "mlflow", "pytorch-metric-learning", "scikit-learn", "numpy")


class RunSubject(NamedTuple):
    """A run.

    Attributes:
        name: As the user named it.
        model: Its trained model.
        logged: The run in MLflow; None where it is not known there.
    """

    name: str
    model: TrainedModel
    logged: LoggedRun | None


class SweepSubject(NamedTuple):
    """A sweep that has finished. config, space: what its options make of the config that it started from."""

    outcome: "SweepOutcome"
    options: "SweepOptions"
    config: Config
    space: "Space"


class ComparisonSubject(NamedTuple):
    """A comparison. run_id: the MLflow run that holds it; None: it is new."""

    title: str
    run_id: str | None
    comparison: Comparison


Subject = RunSubject | SweepSubject | ComparisonSubject


class Report(TypedDict):
    """What `dml report --json` prints.

    Attributes:
        report: Path of the page.
        kind: What it is of: "run", "sweep" or "comparison".
        run_id: The MLflow run of what it is of; None where it is not known.
        logged: Whether the page is an artifact of that run.
        bytes: Size of the page.
        seconds: How long it took.
    """

    report: str
    kind: str
    run_id: str | None
    logged: bool
    bytes: int
    seconds: float


def find_subject(names: Sequence[str], assignments: dict[str, Any], console: Console = messages) -> Subject:
    """Find out what a report is to be of.

    Args:
        names: A run (its MLflow id, a checkpoint folder, or models:/NAME@ALIAS), a sweep (its run id or folder), a
            comparison (the run id of its page), or several runs and experiments to compare.
        assignments: Config values of a run to replace, nested.
        console: Where progress is shown.

    Raises:
        ValueError: There is no such thing, it has not finished, or a value cannot be replaced.
    """
    uri = default_uri(Path.cwd())
    prepare_store(uri)
    name, local = names[0], "://" in names[0] or Path(names[0]).is_dir()
    logged = None if local or len(names) > 1 else find_run(uri, name)
    kind = logged.tags.get("kind", "run") if logged else ""
    subject: SweepSubject | ComparisonSubject | None = None
    if logged and kind == "sweep":
        subject = _read_sweep(f"{logged.params['storage']}/{logged.params['name']}")
    elif local and len(names) == 1:
        subject = _read_sweep(name if "://" in name else str(Path(name).resolve()))
    elif kind == "comparison" and logged:
        subject = ComparisonSubject("Comparison", logged.run_id, read_comparison(uri, logged.run_id))
    elif not logged and not name.startswith("models:/"):
        title = f"Comparison of {' and '.join(names)}"
        subject = ComparisonSubject(title, None, compare_runs(read_runs(uri, names), title, None, METRICS))
    if subject is None:
        return _open_run(uri, name, logged, schema.flatten(assignments), console)
    if assignments:
        raise ValueError(f"{next(iter(schema.flatten(assignments)))} cannot act on a report of a sweep or a comparison")
    return subject


def _open_run(uri: str, name: str, logged: LoggedRun | None, values: dict[str, Any], console: Console) -> RunSubject:
    """Find a run's model and its record in MLflow. values: config values to replace, by dotted keys."""
    if refused := sorted({*values} - REPORT_KEYS):
        raise ValueError(
            f"{refused[0]} cannot act: a report is of the run as it is; {', '.join(sorted(REPORT_KEYS))} may differ"
        )
    # The pictures looked at are few: one worker does it, and the page does not depend on how many there are.
    model = open_model(find_checkpoint(name), values | {"workers": 1}, console)
    if logged is None and (run_file := _read_json(*run_folder.locate(model.trained_by), "run.json")):
        logged = find_run(uri, run_file["run_id"])
    require_splits(model, console)
    return RunSubject(name, model, logged)


def _read_sweep(place: str) -> SweepSubject | None:
    """Read what a sweep has left in its folder, or URL; None where it is not a sweep's."""
    try:
        files, path = pyarrow.fs.FileSystem.from_uri(place)
    except (OSError, ValueError) as error:
        raise ValueError(f"{place}: cannot be read ({str(error).splitlines()[0]})") from None
    if (start := _read_json(files, path, "sweep.json")) is None:
        return None
    if (outcome := _read_json(files, path, "outcome.json")) is None:
        raise ValueError(f"{place}: the sweep has not finished; dml tune --resume {Path(path).name} goes on")
    from pipelines.sweeps.records import SweepOptions, SweepOutcome
    from pipelines.sweeps.spaces import load_space

    options = SweepOptions(**start["options"])
    config, space = load_space(options.space, parse_stored_config(start["config"]))
    return SweepSubject(SweepOutcome.from_json(outcome), options, config, space)


def _read_json(files: pyarrow.fs.FileSystem, folder: str, name: str) -> Any:
    """Read a JSON file of a run's or a sweep's folder; None where there is none, or the storage is not at hand."""
    try:
        return read_json(files, f"{folder}/{name}")
    except OSError:
        return None


def output_path(out: str) -> Path:
    """Check where the page is to go; it replaces an older one. ValueError where it cannot be written."""
    path = Path(out).expanduser().resolve()
    if path.suffix != ".html" or path.is_dir():
        raise ValueError(f"--out {out}: not the name of a file that ends with .html")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--out {out}: no folder {path.parent} that can be written to")
    return path


def write_report(subject: Subject, path: Path, log: bool = True, console: Console = messages) -> Report:
    """Make the page of a run, a sweep or a comparison.

    Args:
        subject: What find_subject returned.
        path: What output_path returned.
        log: Keep the page in MLflow, too: in the subject's run, or in a new one for a new comparison.
        console: Where progress is shown.

    Raises:
        ValueError: The cluster has not what a run's config asks for.
        RunFailed: The worker that looks at a run's pictures failed.
    """
    started, uri, footer = time.monotonic(), default_uri(Path.cwd()), made_by("dml report")
    if isinstance(subject, RunSubject):
        kind, run_id = "run", subject.logged.run_id if subject.logged else None
        page = _page_of_run(subject, footer, console)
    elif isinstance(subject, SweepSubject):
        kind, run_id, page = "sweep", subject.outcome.run_id, _page_of_sweep(subject, footer)
    else:
        from pipelines.compare.page import render_comparison

        kind, run_id = "comparison", subject.run_id
        page = render_comparison(subject.title, subject.comparison, footer)
    write_atomically(path, page)
    if log and run_id:
        log_text(uri, run_id, page, "report.html")
    elif log and isinstance(subject, ComparisonSubject):
        run_id = keep_comparison(uri, subject.comparison, "report.html", page)
    return Report(
        report=str(path),
        kind=kind,
        run_id=run_id,
        logged=log and run_id is not None,
        bytes=path.stat().st_size,
        seconds=time.monotonic() - started,
    )


def _page_of_run(run: RunSubject, footer: str, console: Console) -> str:
    model, logged, state = run.model, run.logged, read_state(run.model.checkpoint)
    metrics = logged.metrics if logged and "test/map_at_r" in logged.metrics else None
    job = InspectJob(model.config, model.unreadable, model.data, metrics=metrics, epoch=max(0, state.epoch - 1))
    inspection = run_with_model(model, job, "report", console)
    with stage(console, "drawing the page"):
        from pipelines.reports.page import render_run

        config = model.trained_by
        title = f"Run {logged.name if logged else config.name or run.name}"
        source = "the run's own numbers"
        if not metrics:
            source = "measured for this page, as MLflow does not know the run's numbers"
        history, environment = _read_longest_history(model), _environment(run, config)
        return render_run(title, config, inspection, history, state.epoch, source, environment, footer)


def _read_longest_history(model: TrainedModel) -> list[EpochRecord]:
    """Read the history from the run's last checkpoint where it is at hand, else from this one, which ends with it."""
    history = read_history(model.checkpoint)
    files, folder = run_folder.locate(model.trained_by)
    try:
        newest = newest_checkpoint(files, folder)
    except OSError:
        newest = None
    if newest is None:
        return history
    with local_copy(files, f"{folder}/{newest}") as local:
        longer = read_history(local)
    return longer if longer[: len(history)] == history else history


def _environment(run: RunSubject, config: Config) -> dict[str, str]:
    """List where a run is, what it was trained with, and what the page is made with. config: of the training."""
    logged = run.logged
    tags = logged.tags if logged else {}
    facts = {
        "run": logged.run_id if logged else "not known to MLflow",
        "checkpoint": str(run.model.checkpoint),
        "pictures of the training": str(read_data(run.model.checkpoint) or "not known: an earlier version trained it"),
        "pictures now": str(run.model.data),
        "commit of the training": tags.get("git_commit", "unknown"),
        "workers of the training": tags.get("workers", str(config.workers)),
        "device of the training": f"{'GPU' if config.use_gpu else 'CPU'}, {config.precision}",
        "report made on": f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
    }
    if "start_from" in tags:
        facts["began with"] = f"{tags['start_from']}, checkpoint {tags['start_fingerprint'][:12]}"
    if "start_saw" in tags:
        facts["test classes that it was trained on"] = tags["start_saw"]
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed as a package"
    return facts


def _page_of_sweep(sweep: SweepSubject, footer: str) -> str:
    from pipelines.reports.sweep_page import render_sweep

    outcome = sweep.outcome
    comparison = Comparison("default", outcome.warnings, outcome.tested)
    facts = {"run": outcome.run_id, "recipe of the winner": outcome.recipe, "model": outcome.model or "none"}
    facts |= {key.replace("_", " "): str(value) for key, value in sweep.options._asdict().items()}
    facts |= {f"space of {key}": domain.domain_str for key, domain in sweep.space.items()}
    return render_sweep(f"Sweep {outcome.sweep}", outcome.trials, sweep.space, comparison, facts, footer)
