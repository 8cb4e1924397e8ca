"""Run a loop over a trained model: the one way in which evaluate, embed and report use one."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from dml_core.data.datasets import SetIdentity
from pipelines.cluster.address import require_cluster
from pipelines.cluster.devices import describe_workers, has_cluster, needs_ray, resolve_devices, resolve_workers
from pipelines.cluster.transfer import SentFiles, scratch_storage, send_files
from pipelines.config.identity import FREE_KEYS, with_absolute_paths
from pipelines.config.recipe import with_values
from pipelines.config.schema import AUTO, Config
from pipelines.console import print_notes, stage
from pipelines.data.check import unreadable_pictures
from pipelines.data.sets import identify, load_splits
from pipelines.kept import keep_meanwhile
from pipelines.models.checkpoint import MODEL_FILES, read_config, read_data
from pipelines.training.job import ModelJob


class TrainedModel(NamedTuple):
    """A trained model and the config that it is used with now.

    Attributes:
        checkpoint: Its folder, on this machine.
        trained_by: The config that it was trained by.
        config: The same with other values, and with absolute paths.
        data: What the set of `config` is.
        unreadable: Names of pictures to leave out.
    """

    checkpoint: Path
    trained_by: Config
    config: Config
    data: SetIdentity
    unreadable: tuple[str, ...]


def open_model(folder: Path, values: Mapping[str, Any], console: Console, labelled: bool = True) -> TrainedModel:
    """Read a trained model's config, replace values of it, and list the pictures to leave out.

    Args:
        folder: Its checkpoint, see models.find.find_checkpoint.
        values: Config values to replace, by dotted keys. Unless they name `workers`, these are as many as help here.
        console: Where it is told what is left out.
        labelled: Whether the set's pictures must have labels.

    Raises:
        ValueError: The values do not fit.
    """
    require_cluster()
    trained_by = read_config(folder)
    config = with_absolute_paths(with_values(trained_by, {"workers": AUTO, **values}))
    with keep_meanwhile():
        with stage(console, "reading the data"):
            data = identify(config.data, partial(console.print, highlight=False, markup=False), labelled)
        unreadable = unreadable_pictures(config.data, data, console, labelled)
    earlier = read_data(folder)
    asks_for_others = not labelled or any(key.startswith("data.") and key not in FREE_KEYS for key in values)
    if earlier and earlier.digest != data.digest and not asks_for_others:
        print_notes(console, [f"the pictures are not those of the training, which were {earlier}; they are {data} now"])
    return TrainedModel(folder, trained_by, config, data, unreadable)


def require_splits(model: TrainedModel, console: Console) -> None:
    """Raise ValueError, before any worker starts, where the set is missing or cannot be split as the config says."""
    with stage(console, "reading the data"):
        print_notes(console, load_splits(model.config, model.unreadable).notes)


def run_with_model(model: TrainedModel, job: ModelJob, name: str, console: Console) -> Any:
    """Run a job's loop on workers that each have the model; a single one is this process.

    Args:
        model: What open_model returned.
        job: With the model's config; its `model` and devices are filled in here.
        name: Of the work, for Ray.
        console: Where progress is shown.

    Returns:
        What the loop returns on rank 0.

    Raises:
        ValueError: The cluster has not what the config asks for.
        RunFailed: Workers failed.
    """
    config, reason = (model.config, "") if has_cluster() else resolve_workers(model.config, trains=False)
    if not needs_ray(config):
        from pipelines.cluster.in_process import run_in_process

        config = resolve_devices(config, here=True, console=console)
        return run_in_process(replace(job, config=config, model=SentFiles(folder=model.checkpoint)), console)
    from pipelines.cluster.launch import run_on_workers
    from pipelines.cluster.session import open_cluster

    with open_cluster(config, logs=None), scratch_storage() as scratch:
        files = send_files(model.checkpoint, MODEL_FILES)
        if config.workers == AUTO:
            config, reason = resolve_workers(config, trains=False)
        config = resolve_devices(config, console=console)
        console.print(describe_workers(config, reason), highlight=False)
        return run_on_workers(replace(job, config=config, model=files), scratch, name, console)
