"""Reach MLflow's store: a first look before anything starts, a client, experiments.

MLflow is imported by the first call, not with these modules: that takes seconds, and a training leaves it to a process
of its own (process.py).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from pipelines.tracking.address import without_password

if TYPE_CHECKING:
    import mlflow


@cache
def import_mlflow() -> ModuleType:
    """Import MLflow, without the lines that it would write on standard error: our commands print theirs."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow
    from mlflow.utils.logging_utils import disable_logging

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    disable_logging()
    return mlflow


def bad_request(message: str) -> Exception:
    """Return the exception to which MLflow's server answers 400 and the message."""
    from mlflow.exceptions import MlflowException

    return MlflowException.invalid_parameter_value(message)


def prepare_store(uri: str) -> None:
    """Make the database, or reach the server.

    Done once, before any worker: several writers that meet on a fresh sqlite file break it.

    Raises:
        ValueError: It does not answer within seconds, or it is no store.
    """
    if not uri.startswith(("sqlite:", "http://", "https://", "postgresql", "mysql", "databricks")):
        raise ValueError(
            f"MLFLOW_TRACKING_URI={without_password(uri)}: not an http(s) server or a database (sqlite:///FILE)"
        )
    try:
        connect(uri).search_experiments(max_results=1)
    except Exception as error:
        reason = without_password(str(error).splitlines()[0][:200])
        logging.getLogger(__name__).debug("MLflow does not answer", exc_info=True)
        raise ValueError(
            f"MLflow at {without_password(uri)} does not answer ({reason}); set MLFLOW_TRACKING_URI or start it"
        ) from None


def connect(uri: str) -> mlflow.MlflowClient:
    """Return a client of the store at an address."""
    client: mlflow.MlflowClient = import_mlflow().MlflowClient(uri)
    return client


def _folder_for(experiment: str) -> str:
    """Return the name of a folder of its own for an experiment, whose name may be a path, or longer than a folder's."""
    if re.fullmatch(r"\w[\w.\- ]{0,99}", experiment):
        return experiment
    return re.sub(r"[^\w\-]+", "-", experiment)[:80] + "-" + hashlib.sha256(experiment.encode()).hexdigest()[:8]


def experiment_id(client: mlflow.MlflowClient, uri: str, name: str) -> str:
    """Return the id of an experiment, which is made if there is none of that name."""
    if experiment := client.get_experiment_by_name(name):
        return experiment.experiment_id
    # Beside a database in a file, artifacts go to a folder next to it; a server has its own place for them.
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts" / _folder_for(name)).as_uri()
    try:
        # The kind chooses which of its two faces MLflow's page shows: training, not chat.
        return client.create_experiment(name, location, {"mlflow.experimentKind": "custom_model_development"})
    except import_mlflow().MlflowException:  # another run made it meanwhile
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise
        return experiment.experiment_id
