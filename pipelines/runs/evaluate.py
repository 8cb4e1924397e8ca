"""Test metrics of a trained model."""

from typing import Any

from rich.console import Console

from pipelines.cluster.devices import resolve_devices
from pipelines.cluster.launch import run_on_workers
from pipelines.cluster.session import open_cluster
from pipelines.cluster.transfer import put_files, scratch_storage
from pipelines.config import schema
from pipelines.config.identity import with_absolute_paths
from pipelines.config.recipe import with_values
from pipelines.data import check
from pipelines.data.sets import load_splits
from pipelines.models.checkpoint import MODEL_FILES, read_config
from pipelines.models.find import find_checkpoint
from pipelines.training.evaluation import evaluate_loop


def evaluate_run(run: str, assignments: dict[str, Any], console: Console) -> dict[str, Any]:
    """Test metrics of a run id, a checkpoint folder or models:/NAME@ALIAS, with config values replaced."""
    found = find_checkpoint(run)
    config = with_absolute_paths(with_values(read_config(found), schema.flatten(assignments)))
    unreadable = check.unreadable(config.data, console)
    with console.status("reading the data"):
        load_splits(config, unreadable)
    with open_cluster(config, None), scratch_storage() as scratch:
        job = {"checkpoint": put_files(found, MODEL_FILES), "unreadable": unreadable}
        config = resolve_devices(config)
        metrics = run_on_workers(evaluate_loop, config, job, scratch, "evaluate", console)
    return {"checkpoint": str(found), "metrics": metrics}
