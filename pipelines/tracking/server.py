"""Reach MLflow's store: its address, a first look before anything starts, experiments."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException

bad_request = MlflowException.invalid_parameter_value  # (message): MLflow's server answers 400 with it

logging.getLogger("alembic").setLevel(logging.WARNING)
logging.getLogger("mlflow").setLevel(logging.ERROR)


def default_uri(folder: Path) -> str:
    """MLFLOW_TRACKING_URI, or a sqlite file in the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / 'mlflow.db'}"


def without_password(uri: str) -> str:
    """Without the password that it may hold."""
    return re.sub(r"://[^/@]*@", "://***@", uri)


def prepare_store(uri: str) -> None:
    """Make the database, or reach the server. ValueError within seconds if it does not answer.

    Done once, before any worker: several writers that meet on a fresh sqlite file break it.
    """
    if not uri.startswith(("sqlite:", "http://", "https://", "postgresql", "mysql", "databricks")):
        raise ValueError(
            f"MLFLOW_TRACKING_URI={without_password(uri)}: not an http(s) server or a database (sqlite:///FILE)"
        )
    try:
        with quiet_mlflow():
            connect(uri).search_experiments(max_results=1)
    except Exception as error:
        reason = without_password(str(error).splitlines()[0][:200])
        told = f"MLflow at {without_password(uri)} does not answer ({reason})"
        raise ValueError(f"{told}; set MLFLOW_TRACKING_URI or start it") from None


def connect(uri: str) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(uri)


def experiment_id(client: mlflow.MlflowClient, uri: str, name: str) -> str:
    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    # Beside a database in a file, artifacts go to a folder next to it; a server has its own place for them.
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts" / name).as_uri()
    try:
        # The kind chooses which of its two faces MLflow's page shows: training, not chat.
        return client.create_experiment(name, location, {"mlflow.experimentKind": "custom_model_development"})
    except MlflowException:  # another run made it meanwhile
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return found.experiment_id


@contextlib.contextmanager
def quiet_mlflow() -> Iterator[None]:
    """MLflow's own chatter on standard error, off: our commands print their own."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        yield
