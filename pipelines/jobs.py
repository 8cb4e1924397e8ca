"""What the driver does around the workers: checks, the run's folder, MLflow's run, the outcome."""

import atexit
import contextlib
import hashlib
import io
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.fs
import ray.train
from rich.console import Console
from torchvision.transforms.functional import to_pil_image

from dml_core.data.datasets import Splits
from pipelines import build, check, checkpoint, embedder, launch, tracking
from pipelines.config import FREE, Config, flatten
from pipelines.console import messages
from pipelines.evaluate import evaluate_loop
from pipelines.recipe import replaced, to_yaml
from pipelines.run_folder import RunFolder
from pipelines.train import train_loop


class Outcome(NamedTuple):
    """What `dml train --json` prints. `checkpoint`: the best epoch's. `model`: its registered version."""

    run_id: str
    experiment: str
    checkpoint: str
    metrics: dict[str, float]
    seconds: float
    images_per_second: float
    name: str
    model: str | None


class Part(NamedTuple):
    """Of a run that is part of a sweep.

    uri, parent: of MLflow, the sweep's run.  tags: of the run.  test: whether it is tested and its model registered.
    report: called with the metrics of each epoch that is validated, when the run is in this process.  callbacks: of Ray
    Train, when it is on workers.
    """

    uri: str
    parent: str
    tags: dict[str, str]
    test: bool
    report: Callable[[dict[str, Any]], object] = dict
    callbacks: Sequence[ray.train.UserCallback] = ()


def train(config: Config, console: Console = messages, here: bool = False, part: Part | None = None) -> Outcome:
    """Train, test and log; or continue, or repeat the outcome of, the run of the same name.

    here: in this process, as the only worker, instead of on a cluster.
    ValueError: bad input, before any worker starts. launch.RunFailed: on the way. KeyboardInterrupt: stopped; so does
    SystemExit, with which Ray Tune ends a trial.
    """
    started = time.monotonic()
    config, test = absolute(config), part is None or part.test
    folder = RunFolder(config)
    earlier = folder.read("run.json")
    unreadable = earlier.get("unreadable", []) if earlier else check.unreadable(config.data, console)
    with console.status("reading the data"):
        splits = build.splits(config, unreadable)
        _check_model(config, len(splits.train.class_names))
    uri = part.uri if part else tracking.default_uri(Path.cwd())
    tracking.prepare(uri)
    with contextlib.nullcontext() if here else launch.cluster(config, folder.logs):
        config = launch.resolve_devices(config, here)
        where = f"workers={config.workers} on {'GPUs' if config.use_gpu else 'CPUs'}, precision={config.precision}"
        console.print(where, highlight=False)
        if earlier:
            _require_same(config, earlier["config"], folder.path)
            if result := folder.read("result.json"):
                console.print(f"{config.name} is finished; this is its outcome. Another name starts a new run.")
                return Outcome(**result)
            console.print(f"continuing {config.name}")
            tracking.resume_run(uri, earlier["run_id"], {"workers": str(config.workers)})
        else:
            told = f"{folder.path}  (if interrupted, name={config.name} continues it)"
            console.print(told, highlight=False, markup=False, soft_wrap=True)
        run_id = earlier["run_id"] if earlier else _start_run(uri, config, splits, unreadable, part)
        begun = {"run_id": run_id, "config": config.model_dump(exclude_none=True), "unreadable": unreadable}
        folder.write("run.json", begun)
        assert config.name
        job = {"run_id": run_id, "tracking_uri": uri, "unreadable": unreadable, "test": test}
        status = "FAILED"
        try:
            if here:
                metrics = launch.run_here(train_loop, config, job, part.report if part else dict)
            else:
                callbacks = part.callbacks if part else ()
                metrics = launch.run(train_loop, config, job, config.storage, config.name, console, callbacks)
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        finally:
            tracking.end_run(uri, run_id, status)
    unsent = metrics.pop("unsent")
    best = checkpoint.folder_name(int(metrics["best_epoch"]))
    model = None
    try:
        if test:
            with console.status("registering the model"):
                model = _log_model(uri, run_id, config, folder, best, splits)
    except Exception as error:
        unsent += 1
        console.print(f"the model is not registered: {str(error).splitlines()[0]}", style="yellow")
    outcome = Outcome(
        run_id=run_id,
        experiment=config.data.name,
        checkpoint=f"{config.storage}/{config.name}/{best}",
        metrics=metrics,
        seconds=time.monotonic() - started,
        images_per_second=metrics["train/images_per_second"],
        name=config.name,
        model=model,
    )
    if unsent:
        console.print(
            f"MLflow lacks a part of this run; `dml train name={config.name} ...` again sends it", style="yellow"
        )
    else:
        folder.write("result.json", outcome._asdict())
    return outcome


def find_checkpoint(run: str) -> Path:
    """The folder, on this machine, of an MLflow run id, a checkpoint folder here or in a bucket, or models:/NAME@ALIAS.
    ValueError: not there, or torn."""
    found = Path(run)
    if "://" in run:
        found = Path(tempfile.mkdtemp(prefix="dml-"))
        atexit.register(shutil.rmtree, found, ignore_errors=True)
        try:
            pyarrow.fs.copy_files(run, str(found))
        except (OSError, ValueError) as error:
            raise ValueError(f"{run}: cannot be read ({str(error).splitlines()[0]})") from None
    elif not found.is_dir():
        uri = tracking.default_uri(Path.cwd())
        tracking.prepare(uri)
        found = tracking.find_checkpoint(uri, run)
    if not checkpoint.whole(found):
        raise ValueError(f"{run}: not a whole checkpoint folder (its manifest does not fit)")
    return found.resolve()


def evaluate(run: str, assignments: dict[str, Any], console: Console) -> dict[str, Any]:
    """Test metrics of a run id, a checkpoint folder or models:/NAME@ALIAS, with config values replaced."""
    found = find_checkpoint(run)
    config = absolute(replaced(checkpoint.read_config(found), flatten(assignments)))
    unreadable = check.unreadable(config.data, console)
    with console.status("reading the data"):
        build.splits(config, unreadable)
    with launch.cluster(config, None), launch.scratch_storage() as scratch:
        job = {"checkpoint": launch.held(found, embedder.FILES), "unreadable": unreadable}
        config = launch.resolve_devices(config)
        metrics = launch.run(evaluate_loop, config, job, scratch, "evaluate", console)
    return {"checkpoint": str(found), "metrics": metrics}


def absolute(config: Config) -> Config:
    """A name for the run, and paths that mean the same in a worker's working folder."""
    name = config.name
    if name is None:
        parts = [config.data.name, *config.method, config.loss.name, f"s{config.seed}"]
        name = "-".join([*parts, datetime.now().strftime("%Y%m%d-%H%M%S")])
    storage = config.storage if "://" in config.storage else str(Path(config.storage).expanduser().resolve())
    places = {"root": config.data.root, "table": config.data.table}
    local = {k: str(Path(v).expanduser().resolve()) for k, v in places.items() if v and "://" not in v}
    data = config.data.model_copy(update=local)
    return config.model_copy(update={"name": name, "storage": storage, "data": data})


def _check_model(config: Config, classes: int) -> None:
    """Build it here once: an unknown network, or weights that cannot be had, shall stop us before any worker starts."""
    try:
        loss = build.learner(config, classes).base_loss
    except OSError as error:
        raise ValueError(f"backbone.weights={config.backbone.weights}: cannot be had here ({error})") from None
    if loss.needs_positives and config.batch.images < 2:
        raise ValueError(
            f"batch.images=1: loss.name={config.loss.name} compares images of one class and needs at least 2"
        )


def _require_same(config: Config, earlier: dict[str, Any], path: str) -> None:
    old, new = flatten(earlier), config.flat()
    different = [k for k in sorted({*old, *new}) if k not in FREE and old.get(k) != new.get(k)]
    if different:
        changes = ", ".join(f"{k}={new.get(k)} (was {old.get(k)})" for k in different[:4])
        raise ValueError(f"name={config.name} was begun with another config in {path}: {changes}; choose another name")


def settle(uri: str, parent: str, storage: str) -> None:
    """Runs of a sweep that were ended in the middle: MLflow gets what they reached, and they are running no longer."""
    for run in tracking.running(uri, parent):
        files, root = pyarrow.fs.FileSystem.from_uri(storage)
        folder = f"{root}/{run.name}"
        if (newest := checkpoint.newest(files, folder)) is not None:
            with checkpoint.fetched(files, f"{folder}/{newest}") as local:
                tracking.Tracker(uri, run.run_id, checkpoint.read_history(local)).close()
        tracking.end_run(uri, run.run_id, "KILLED")


def start_run(uri: str, config: Config, params: dict[str, Any], tags: dict[str, str], splits: Splits) -> str:
    """A run of MLflow's for a config, its data set and tags included. Returns its id."""
    assert config.name
    tags = {
        "method": "+".join(config.method) or "none",
        "base_loss": config.loss.name,
        "backbone": config.backbone.name,
        "data": config.data.name,
        "seed": str(config.seed),
        "git_commit": _git_commit(),
        **tags,
    }
    source = config.data.table or config.data.root or "embedded"
    whole = splits.train.whole or splits.train
    run_id = tracking.start_run(uri, config.data.name, config.name, params, tags, whole.digest(), source)
    tracking.log_text(uri, run_id, to_yaml(config), "config.yaml")
    return run_id


def _start_run(uri: str, config: Config, splits: Splits, unreadable: list[str], part: Part | None) -> str:
    flat, tags = config.flat(), {"workers": str(config.workers)}
    if part:
        tags |= part.tags | {"mlflow.parentRunId": part.parent}
    if part is None or part.test:  # a trial has nothing that `dml compare` could compare
        group = {k: v for k, v in flat.items() if k not in (*FREE, "seed")}
        tags["group"] = hashlib.sha256(json.dumps(group, sort_keys=True, default=str).encode()).hexdigest()[:12]
    run_id = start_run(uri, config, flat, tags, splits)
    if unreadable:
        tracking.log_text(uri, run_id, "\n".join(unreadable), "left_out.txt")
    return run_id


def _log_model(uri: str, run_id: str, config: Config, folder: RunFolder, best: str, splits: Splits) -> str:
    example = io.BytesIO()
    to_pil_image(splits.tests["test"].query.picture(0, config.data.image_size)).save(example, "PNG")
    name = config.model_name or f"dml-{config.data.name}"
    with checkpoint.fetched(folder.filesystem, f"{folder.path}/{best}") as local:
        return tracking.log_model(uri, run_id, local, name, example.getvalue(), config.embedding_dim, _version())


def _version() -> str:
    try:
        return version("dml-ray")
    except PackageNotFoundError:
        return "0"


def _git_commit() -> str:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
