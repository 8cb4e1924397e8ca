"""The address of MLflow's store. Imports no MLflow: commands that need no store must not wait for it."""

import os
import re
from pathlib import Path


def default_uri(folder: Path) -> str:
    """Return MLFLOW_TRACKING_URI, or a sqlite file in a folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / 'mlflow.db'}"


def without_password(uri: str) -> str:
    """Return an address without the password that it may hold."""
    return re.sub(r"://[^/@]*@", "://***@", uri)
