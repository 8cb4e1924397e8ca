"""Say in one line why MLflow's store refuses, and how to go on: of MLflow, its database or the network."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

from pipelines.tracking.address import database_file, without_password

LIBRARIES = ("mlflow", "sqlalchemy", "alembic", "sqlite3")  # whose exceptions tell of the store

# What MLflow's database says -> what is wrong with its file, and how to go on.
DATABASE_FAULTS = (
    (
        r"file is not a database|disk image is malformed",
        "MLflow's database {file} is damaged, or no database; put a copy back, or move it away: a new one is made",
    ),
    (
        r"readonly database|unable to open database file|[Pp]ermission denied|Read-only file system",
        "MLflow's database {file} cannot be written to; make it and its folder writable, or set MLFLOW_TRACKING_URI",
    ),
    (
        r"database is locked",
        "MLflow's database {file} is locked by another program; end that program, or wait for it, and try again",
    ),
    (
        r"database or disk is full",
        "MLflow's database {file} has no room on its disk; free some, or set MLFLOW_TRACKING_URI",
    ),
)


@contextlib.contextmanager
def refused_in_one_line(uri: str) -> Iterator[None]:
    """Raise what MLflow, its database and the network raise in the block as a ValueError of one line.

    Args:
        uri: MLflow's store, which the line names.
    """
    try:
        yield
    except Exception as error:
        of_store = type(error).__module__.partition(".")[0] in LIBRARIES
        if not (of_store or isinstance(error, OSError | ImportError)):
            raise
        logging.getLogger(__name__).debug("MLflow refuses", exc_info=True)
        raise ValueError(explain(error, uri)) from error


def explain(error: Exception, uri: str) -> str:
    """Return in one line why the store at an address refused, and how to go on."""
    address, text = without_password(uri), without_password(str(error))
    database = database_file(uri)
    for sign, words in DATABASE_FAULTS:
        if re.search(sign, text) and not uri.startswith("http"):
            return words.format(file=database or address)
    if schema := re.search(r"database schema \(found version (\w+), but expected (\w+)", text):
        return (
            f"MLflow's database {database or address} is of another version of MLflow (schema {schema[1]}; {schema[2]} "
            f"is wanted); of an older one: copy it, then `mlflow db upgrade {address}`; "
            "of a newer one: pip install --upgrade mlflow"
        )
    if isinstance(error, ImportError):
        return (
            f"MLFLOW_TRACKING_URI={address}: Python's driver of this database is not installed; "
            f"pip install {(error.name or 'it').partition('.')[0]}"
        )
    code = getattr(error, "error_code", "")
    if code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return (
            f"MLflow at {address} refuses this user ({code.lower().replace('_', ' ')}); set MLFLOW_TRACKING_USERNAME "
            "and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, of one that may write"
        )
    if code == "ENDPOINT_NOT_FOUND" or "not in a valid JSON format" in text:
        return f"MLFLOW_TRACKING_URI={address}: what answers there is no MLflow server; see its host, port and path"
    if status := re.search(r"too many (\d+) error responses", text):
        return f"MLflow at {address} answers with the error {status[1]}; the server's own log says why"
    if uri.startswith("http") and code not in ("INTERNAL_ERROR", ""):
        return f"MLflow at {address} refuses: {_first_line(text)}"
    if database:
        reason = _reason(text)
        return (
            f"MLflow's database {database} cannot be used ({reason}); set MLFLOW_TRACKING_URI=sqlite:///FILE to another"
        )
    return f"MLflow at {address} does not answer ({_reason(text)}); set MLFLOW_TRACKING_URI or start it"


def _reason(text: str) -> str:
    """Return what matters of a network's error, which wraps it in several others."""
    inner = re.search(r"\[Errno -?\d+\] ([\w ]+)|(timed out)|(certificate verify failed|WRONG_VERSION_NUMBER)", text)
    reason = next(filter(None, inner.groups())) if inner else _first_line(text)
    return reason.replace("WRONG_VERSION_NUMBER", "it speaks http, not https")


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[0][:200]
