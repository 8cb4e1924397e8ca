"""What the driver does around the workers: checks, the run's folder, MLflow's run, the outcome."""

import contextlib
import io
import time
from pathlib import Path

from rich.console import Console
from torchvision.transforms.functional import to_pil_image

from dml_core.data.datasets import Splits
from pipelines.cluster.devices import resolve_devices
from pipelines.cluster.launch import run_in_process, run_on_workers
from pipelines.cluster.session import open_cluster
from pipelines.config.identity import require_same, with_absolute_paths
from pipelines.config.schema import Config
from pipelines.console import messages
from pipelines.data import check
from pipelines.data.sets import load_splits
from pipelines.models.build import build_learner
from pipelines.models.run_folder import RunFolder, checkpoint_name, local_copy
from pipelines.runs.outcome import SweepMember, TrainOutcome
from pipelines.runs.record import package_version, record_training
from pipelines.tracking.models import log_model
from pipelines.tracking.runs import end_run, resume_run
from pipelines.tracking.server import default_uri, prepare_store
from pipelines.training.loop import train_loop


def run_training(
    config: Config, console: Console = messages, here: bool = False, part: SweepMember | None = None
) -> TrainOutcome:
    """Train, test and log; or continue, or repeat the outcome of, the run of the same name.

    here: in this process, as the only worker, instead of on a cluster.
    ValueError: bad input, before any worker starts. launch.RunFailed: on the way. KeyboardInterrupt: stopped; so does
    SystemExit, with which Ray Tune ends a trial.
    """
    started = time.monotonic()
    config, test = with_absolute_paths(config), part is None or part.test
    folder = RunFolder(config)
    earlier = folder.read("run.json")
    unreadable = earlier.get("unreadable", []) if earlier else check.unreadable(config.data, console)
    with console.status("reading the data"):
        splits = load_splits(config, unreadable)
        _check_model(config, len(splits.train.class_names))
    uri = part.uri if part else default_uri(Path.cwd())
    prepare_store(uri)
    with contextlib.nullcontext() if here else open_cluster(config, folder.logs):
        config = resolve_devices(config, here)
        where = f"workers={config.workers} on {'GPUs' if config.use_gpu else 'CPUs'}, precision={config.precision}"
        console.print(where, highlight=False)
        if earlier:
            require_same(config, earlier["config"], folder.path)
            if result := folder.read("result.json"):
                console.print(f"{config.name} is finished; this is its outcome. Another name starts a new run.")
                return TrainOutcome(**result)
            console.print(f"continuing {config.name}")
            resume_run(uri, earlier["run_id"], {"workers": str(config.workers)})
        else:
            told = f"{folder.path}  (if interrupted, name={config.name} continues it)"
            console.print(told, highlight=False, markup=False, soft_wrap=True)
        run_id = earlier["run_id"] if earlier else record_training(uri, config, splits, unreadable, part)
        begun = {"run_id": run_id, "config": config.model_dump(exclude_none=True), "unreadable": unreadable}
        folder.write("run.json", begun)
        assert config.name
        job = {"run_id": run_id, "tracking_uri": uri, "unreadable": unreadable, "test": test}
        status = "FAILED"
        try:
            if here:
                metrics = run_in_process(train_loop, config, job, part.report if part else dict)
            else:
                callbacks = part.callbacks if part else ()
                metrics = run_on_workers(train_loop, config, job, config.storage, config.name, console, callbacks)
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        finally:
            end_run(uri, run_id, status)
    unsent = metrics.pop("unsent")
    best = checkpoint_name(int(metrics["best_epoch"]))
    model = None
    try:
        if test:
            with console.status("registering the model"):
                model = _log_model(uri, run_id, config, folder, best, splits)
    except Exception as error:
        unsent += 1
        console.print(f"the model is not registered: {str(error).splitlines()[0]}", style="yellow")
    outcome = TrainOutcome(
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


def _check_model(config: Config, classes: int) -> None:
    """Build it here once: an unknown network, or weights that cannot be had, shall stop us before any worker starts."""
    try:
        loss = build_learner(config, classes).base_loss
    except OSError as error:
        raise ValueError(f"backbone.weights={config.backbone.weights}: cannot be had here ({error})") from None
    if loss.needs_positives and config.batch.images < 2:
        raise ValueError(
            f"batch.images=1: loss.name={config.loss.name} compares images of one class and needs at least 2"
        )


def _log_model(uri: str, run_id: str, config: Config, folder: RunFolder, best: str, splits: Splits) -> str:
    example = io.BytesIO()
    to_pil_image(splits.tests["test"].query.picture(0, config.data.image_size)).save(example, "PNG")
    name = config.model_name or f"dml-{config.data.name}"
    with local_copy(folder.filesystem, f"{folder.path}/{best}") as local:
        return log_model(uri, run_id, local, name, example.getvalue(), config.embedding_dim, package_version())
