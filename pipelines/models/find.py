"""Find the checkpoint that a run id, a folder, a URL or a registered model names."""

import atexit
import re
import shutil
import tempfile
from pathlib import Path

import pyarrow.fs

from pipelines.models.checkpoint import is_whole
from pipelines.models.run_folder import best_checkpoint
from pipelines.tracking.address import default_uri, without_password

RUN_ID = re.compile(r"[0-9a-f]{32}")


def find_checkpoint(run: str) -> Path:
    """Find the checkpoint folder that a name means; one that is elsewhere is copied until this process ends.

    Args:
        run: An MLflow run id, a checkpoint folder or its URL in a bucket, likewise a run's folder, which stands for its
            best checkpoint, or models:/NAME@ALIAS.

    Raises:
        ValueError: It is not there, or it is torn.
    """
    folder = Path(run)
    if "://" in run:
        folder = Path(tempfile.mkdtemp(prefix="dml-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        try:
            files, path = pyarrow.fs.FileSystem.from_uri(run)
            name = _best_of_run(files, path)
            pyarrow.fs.copy_files(f"{path}{name}", str(folder), source_filesystem=files)
        except (OSError, ValueError) as error:
            raise ValueError(f"{run}: cannot be read ({str(error).splitlines()[0]})") from None
    elif folder.is_dir():
        folder = Path(f"{run}{_best_of_run(pyarrow.fs.LocalFileSystem(), run)}")
    else:
        folder = _fetch_from_mlflow(run)
    if not is_whole(folder):
        what = (
            "a run's folder without a whole checkpoint" if (folder / "run.json").is_file() else "not a whole checkpoint"
        )
        raise ValueError(f"{run}: {what} folder (its manifest does not fit)")
    return folder.resolve()


def _best_of_run(files: pyarrow.fs.FileSystem, path: str) -> str:
    """Return /NAME of the best checkpoint where a path is a run's folder with one; else nothing to add to the path."""
    is_run = files.get_file_info(f"{path}/run.json").is_file
    name = best_checkpoint(files, path) if is_run else None
    return f"/{name}" if name else ""


def _fetch_from_mlflow(run: str) -> Path:
    uri = default_uri(Path.cwd())
    if not run.startswith("models:/") and not RUN_ID.fullmatch(run):
        # Told without MLflow, which takes seconds to import.
        raise ValueError(
            f"{run}: not a checkpoint folder, and unknown to MLflow at {without_password(uri)} (a run's id has 32 "
            "hexadecimal digits; dml ui shows them)"
        )
    from pipelines.tracking.models import fetch_checkpoint
    from pipelines.tracking.server import prepare_store

    prepare_store(uri)
    return fetch_checkpoint(uri, run)
