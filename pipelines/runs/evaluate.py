"""Test metrics of a trained model."""

from collections.abc import Mapping
from typing import Any, TypedDict

from rich.console import Console

from pipelines.config.schema import flatten
from pipelines.console import messages, stage
from pipelines.models.find import find_checkpoint


class Evaluation(TypedDict):
    """What `dml evaluate --json` prints: the checkpoint's folder, and test metrics by name."""

    checkpoint: str
    metrics: dict[str, float]


def evaluate_run(run: str, assignments: Mapping[str, Any], console: Console = messages) -> Evaluation:
    """Measure a trained model on its own test classes or, with other config values, on other data.

    Args:
        run: An MLflow run id, a checkpoint folder or URL, or models:/NAME@ALIAS.
        assignments: Config values to replace, nested or by dotted keys.
        console: Where progress is shown.

    Raises:
        ValueError: Bad input, before any worker starts.
        RunFailed: Workers failed.
    """
    folder = find_checkpoint(run)  # before torch is imported: what is not there is refused at once
    with stage(console, "starting"):
        from pipelines.runs.with_model import open_model, require_splits, run_with_model
        from pipelines.training.job import ModelJob

    model = open_model(folder, flatten(dict(assignments)), console)
    require_splits(model, console)
    metrics = run_with_model(model, ModelJob(model.config, model.unreadable, model.data), "evaluate", console)
    return {"checkpoint": str(model.checkpoint), "metrics": metrics}
