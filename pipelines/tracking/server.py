"""Reach MLflow's store: a first look before anything starts, a client, experiments.

MLflow is imported by the first call, not with these modules: that takes seconds, and a training leaves it to a process
of its own (process.py).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from pipelines.tracking.address import database_file, without_password
from pipelines.tracking.moved_files import ARTIFACTS, follow_moved_files, local_folder
from pipelines.tracking.refusals import refused_in_one_line

if TYPE_CHECKING:
    import mlflow

LAST_START = "dml.last_start"  # a tag of an experiment, by which each start writes to the store


@cache
def import_mlflow() -> ModuleType:
    """Import MLflow, without the lines that it would write on standard error: our commands print theirs."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
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

    Done once, before any worker; of several commands that meet on a database that is not made yet, one makes it.

    Raises:
        ValueError: It does not answer within seconds, or it is no store that this MLflow can use.
    """
    if not uri.startswith(("sqlite:", "http://", "https://", "postgresql", "mysql", "databricks")):
        raise ValueError(
            f"MLFLOW_TRACKING_URI={without_password(uri)}: not an http(s) server or a database (sqlite:///FILE)"
        )
    database = database_file(uri)
    if database and database.is_dir():  # MLflow would try it for minutes
        raise ValueError(f"MLflow's database {database} is a folder; remove it, or set MLFLOW_TRACKING_URI")
    import_mlflow()
    with refused_in_one_line(uri), _lock_on(database):
        connect(uri).search_experiments(max_results=1)
        if database:
            follow_moved_files(database)


def _lock_on(database: Path | None) -> AbstractContextManager[object]:
    """Return a lock on an SQLite database, as MLflow makes its tables without one; None: a server, which needs none."""
    if not database:
        return nullcontext()
    from filelock import FileLock  # with asyncio, which is not for every command that reads this module

    # Not beside the database, whose folder may be one that can only be read.
    digest = hashlib.sha256(str(database).encode()).hexdigest()[:16]
    return FileLock(Path(tempfile.gettempdir(), f"dml-mlflow-{os.geteuid()}-{digest}.lock"))


def prepare_run(uri: str, experiment: str, run_id: str | None = None, otherwise: str = "") -> None:
    """Prepare the store for a run, and write to it, so that what would refuse the run's first lines does so now.

    Args:
        uri: MLflow's store.
        experiment: The experiment of a new run, by name; it is made if there is none.
        run_id: A run that goes on, instead.
        otherwise: How to go on where that run is not to be had.

    Raises:
        ValueError: The store refuses, the experiment or the run is deleted, or the run's files cannot be written.
    """
    prepare_store(uri)
    client = connect(uri)
    with refused_in_one_line(uri):
        if run_id:
            run = _require_run(client, uri, run_id, otherwise)
            within, files = run.info.experiment_id, run.info.artifact_uri
        else:
            within = experiment_id(client, uri, experiment)
            files = client.get_experiment(within).artifact_location
        now = time.strftime("%Y-%m-%d %H:%M:%S %z")
        try:
            client.set_experiment_tag(within, LAST_START, now)
        except import_mlflow().MlflowException as error:
            if error.error_code != "BAD_REQUEST":
                raise
            # Another start has inserted the tag since MLflow looked for it.
            client.set_experiment_tag(within, LAST_START, now)
    if files and (folder := local_folder(files)):
        _require_writable(folder)


def _require_run(client: mlflow.MlflowClient, uri: str, run_id: str, otherwise: str) -> mlflow.entities.Run:
    """Return a run that may go on. ValueError where the store has it no more."""
    mlflow, where = import_mlflow(), f"MLflow at {without_password(uri)}"
    try:
        run = client.get_run(run_id)
    except mlflow.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise ValueError(
            f"run {run_id} is unknown to {where}; set MLFLOW_TRACKING_URI to the store that has it; {otherwise}"
        ) from None
    require_active(client.get_experiment(run.info.experiment_id), uri, otherwise)
    if run.info.lifecycle_stage == "deleted":
        restore = f"MLFLOW_TRACKING_URI={without_password(uri)} mlflow runs restore --run-id {run_id}"
        raise ValueError(f"run {run_id} is deleted in {where}; `{restore}` restores it; {otherwise}")
    return run


def require_active(experiment: mlflow.entities.Experiment, uri: str, otherwise: str) -> None:
    """Raise ValueError for an experiment that is deleted in MLflow. otherwise: how to go on without it."""
    if experiment.lifecycle_stage == "deleted":
        address = without_password(uri)
        restore = f"MLFLOW_TRACKING_URI={address} mlflow experiments restore --experiment-id {experiment.experiment_id}"
        raise ValueError(
            f"experiment {experiment.name} is deleted in MLflow at {address}; `{restore}` restores it; {otherwise}"
        )


def _require_writable(folder: Path) -> None:
    """Raise ValueError where the files of runs cannot be written: by writing one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        raise ValueError(
            f"MLflow keeps the files of runs in {folder}, which cannot be written to ({error.strerror}); make it "
            "writable, or set MLFLOW_TRACKING_URI"
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
    """Return the id of an experiment, which is made if there is none of that name. ValueError: it is deleted."""
    if experiment := client.get_experiment_by_name(name):
        require_active(experiment, uri, "experiment=OTHER takes another")
        return experiment.experiment_id
    # Beside a database in a file, artifacts go to a folder next to it; a server has its own place for them.
    database = database_file(uri)
    location = (database.parent / ARTIFACTS / _folder_for(name)).as_uri() if database else None
    try:
        # The kind chooses which of its two faces MLflow's page shows: training, not chat.
        return client.create_experiment(name, location, {"mlflow.experimentKind": "custom_model_development"})
    except import_mlflow().MlflowException:  # another run made it meanwhile
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise
        return experiment.experiment_id
