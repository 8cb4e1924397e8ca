"""The address of MLflow's store. Imports no MLflow: commands that need no store must not wait for it."""

import os
import re
from pathlib import Path


def default_uri(folder: Path) -> str:
    """Return MLFLOW_TRACKING_URI, or a sqlite file in a folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / 'mlflow.db'}"


def experiment_of_environment() -> str | None:
    """Return MLFLOW_EXPERIMENT_NAME; None where it is not set.

    Raises:
        ValueError: A variable of MLflow's is set that would have a run recorded elsewhere.
    """
    if run_id := os.environ.get("MLFLOW_RUN_ID"):
        raise ValueError(
            f"MLFLOW_RUN_ID={run_id}: a training makes a run of its own in MLflow; unset MLFLOW_RUN_ID "
            "(name=NAME again continues a run)"
        )
    if number := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        raise ValueError(
            f"MLFLOW_EXPERIMENT_ID={number}: experiments are chosen by name; unset it, and set experiment=NAME or "
            "MLFLOW_EXPERIMENT_NAME"
        )
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or None


def database_file(uri: str) -> Path | None:
    """Return the file of a store that is an SQLite database; None for a server."""
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(path).resolve() if uri.startswith("sqlite:///") else None


def without_password(uri: str) -> str:
    """Return an address without the password that it may hold."""
    return re.sub(r"://[^/@]*@", "://***@", uri)
