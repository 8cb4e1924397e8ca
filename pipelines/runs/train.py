"""Train one run, from the driver: checks, the run's folder, MLflow's run, workers, the outcome."""

import contextlib
import logging
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from dml_core.data.datasets import Splits
from pipelines.cluster.devices import resolve_devices
from pipelines.cluster.launch import run_in_process, run_on_workers
from pipelines.cluster.session import open_cluster
from pipelines.config.identity import require_same, with_absolute_paths
from pipelines.config.schema import Config
from pipelines.console import messages
from pipelines.data.check import unreadable_pictures
from pipelines.data.sets import cache_folder, load_splits
from pipelines.models.build import build_learner
from pipelines.models.run_folder import RunFolder, checkpoint_name
from pipelines.runs.log import logged_to
from pipelines.runs.outcome import SweepMember, TrainOutcome
from pipelines.runs.record import record_training, register_model
from pipelines.tracking.address import default_uri
from pipelines.tracking.runs import end_run, resume_run
from pipelines.tracking.server import prepare_store
from pipelines.training.job import TrainingJob


class Inputs(NamedTuple):
    """A run's data, checked: its splits, and the names of pictures that are left out."""

    splits: Splits
    unreadable: tuple[str, ...]


def run_training(
    config: Config, console: Console = messages, here: bool = False, member: SweepMember | None = None
) -> TrainOutcome:
    """Train, test and log a run; or continue, or repeat the outcome of, the run of the same name.

    Args:
        config: Of the run.
        console: Where messages and progress go.
        here: In this process, as the only worker, instead of on a cluster.
        member: What a run that belongs to a sweep is given.

    Raises:
        ValueError: Bad input, before any worker starts.
        RunFailed: Workers failed on the way.
        KeyboardInterrupt: The run was stopped; likewise SystemExit, with which Ray Tune ends a trial.
    """
    started = time.monotonic()
    config = with_absolute_paths(config)
    folder = RunFolder(config)
    earlier = folder.read("run.json")
    inputs = check_inputs(config, tuple(earlier.get("unreadable", ())) if earlier else None, console)
    uri = member.uri if member else default_uri(Path.cwd())
    prepare_store(uri)
    log_folder = folder.logs or cache_folder() / "logs" / str(config.name)
    with logged_to(log_folder) as log, contextlib.nullcontext() if here else open_cluster(config, folder.logs):
        config = resolve_devices(config, here)
        devices = "GPUs" if config.use_gpu else "CPUs"
        console.print(f"workers={config.workers} on {devices}, precision={config.precision}", highlight=False)
        if earlier:
            require_same(config, earlier["config"], folder.path)
            if result := folder.read("result.json"):
                console.print(f"{config.name} is finished; this is its outcome. Another name starts a new run.")
                return TrainOutcome(**result)
            console.print(f"continuing {config.name}")
            run_id = earlier["run_id"]
            resume_run(uri, run_id, {"workers": str(config.workers)})
        else:
            line = f"{folder.path}  (if interrupted, name={config.name} continues it)"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
            run_id = record_training(uri, config, inputs.splits, inputs.unreadable, member)
        folder.write("run.json", {"run_id": run_id, "config": config.to_dict(), "unreadable": inputs.unreadable})
        metrics = _train(config, inputs, uri, run_id, console, here, member)
        unsent = metrics.pop("unsent")
        best, model = checkpoint_name(int(metrics["best_epoch"])), None
        if member is None or member.test:
            try:
                with console.status("registering the model"):
                    model = register_model(uri, run_id, config, folder, best, inputs.splits)
            except Exception as error:
                logging.getLogger(__name__).exception("the model is not registered")
                unsent += 1
                reason = str(error).splitlines()[0]
                console.print(f"the model is not registered: {reason} ({log} has the traceback)", style="yellow")
    outcome = TrainOutcome(
        run_id=run_id,
        experiment=config.data.name,
        checkpoint=f"{config.storage}/{config.name}/{best}",
        metrics=metrics,
        seconds=time.monotonic() - started,
        images_per_second=metrics["train/images_per_second"],
        name=str(config.name),
        model=model,
    )
    if unsent:
        console.print(
            f"MLflow lacks a part of this run; `dml train name={config.name} ...` again sends it", style="yellow"
        )
    else:
        folder.write("result.json", outcome._asdict())
    return outcome


def check_inputs(config: Config, unreadable: tuple[str, ...] | None, console: Console) -> Inputs:
    """Read the data and build the learner once, so that what is wrong with them ends a run before any worker starts.

    Args:
        config: Of the run.
        unreadable: Names of pictures to leave out, known from before; None: they are looked for.
        console: Where messages go.

    Raises:
        ValueError: The set is missing or too small; the network is unknown, or its weights are not here.
    """
    if unreadable is None:
        unreadable = unreadable_pictures(config.data, console)
    with console.status("reading the data"):
        splits = load_splits(config, unreadable)
        try:
            loss = build_learner(config, len(splits.train.class_names)).base_loss
        except OSError as error:
            raise ValueError(f"backbone.weights={config.backbone.weights}: cannot be had here ({error})") from None
    if loss and loss.needs_positives and config.batch.images < 2:
        raise ValueError(
            f"batch.images=1: loss.name={config.loss.name} compares images of one class and needs at least 2"
        )
    return Inputs(splits, unreadable)


def _train(
    config: Config, inputs: Inputs, uri: str, run_id: str, console: Console, here: bool, member: SweepMember | None
) -> dict[str, float]:
    """Run the training loop, and end MLflow's run as it ended. Return the final metrics."""
    job = TrainingJob(config, inputs.unreadable, run_id=run_id, tracking_uri=uri, test=member is None or member.test)
    status = "FAILED"
    try:
        if here:
            metrics = run_in_process(job, member.report if member else dict)
        else:
            callbacks = member.callbacks if member else ()
            metrics = run_on_workers(job, config.storage, str(config.name), console, callbacks)
        status = "FINISHED"
        return metrics
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        end_run(uri, run_id, status)
