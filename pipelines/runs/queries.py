"""The queries of a run's test, each with its scores and nearest pictures: evaluated once, then kept in the cache."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines.config.identity import group_of
from pipelines.data.sets import cache_folder
from pipelines.models.checkpoint import model_fingerprint
from pipelines.runs.evaluate import evaluate_run
from pipelines.runs.record import package_version
from pipelines.runs.with_model import TrainedModel
from pipelines.training.query_rows import COLUMNS


def queries_file(model: TrainedModel) -> Path:
    """Return where the cache keeps a model's queries: a name of all that they depend on, whether it is there or not."""
    settings = group_of(model.config.flat(), model.data.digest)
    depends_on = [model_fingerprint(model.checkpoint), settings, *model.unreadable, *COLUMNS.names, package_version()]
    name = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:32]
    return cache_folder() / "queries" / f"{name}.parquet"


def evaluate_queries(model: TrainedModel, values: Mapping[str, Any], console: Console) -> Path:
    """Evaluate a model on its own test, unless the cache has its queries.

    Args:
        model: What open_model returned.
        values: The values that it was opened with.
        console: Where progress is shown.

    Returns:
        The file of its queries, see training/query_rows.py.

    Raises:
        RunFailed: Workers failed.
    """
    file = queries_file(model)
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f"{file.stem}-{os.getpid()}.parquet")  # of this process alone, until it is whole
        evaluate_run(str(model.checkpoint), values, console, str(new))
        os.replace(new, file)
    return file
