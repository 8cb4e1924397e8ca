"""Find the checkpoint that a run id, a folder, a URL or a registered model names."""

import atexit
import shutil
import tempfile
from pathlib import Path

import pyarrow.fs

from pipelines.models.checkpoint import is_whole
from pipelines.tracking.models import fetch_checkpoint
from pipelines.tracking.server import default_uri, prepare_store


def find_checkpoint(run: str) -> Path:
    """The folder, on this machine, of an MLflow run id, a checkpoint folder here or in a bucket, or models:/NAME@ALIAS.
    ValueError: not there, or torn."""
    found = Path(run)
    if "://" in run:
        found = Path(tempfile.mkdtemp(prefix="dml-"))
        atexit.register(shutil.rmtree, found, ignore_errors=True)
        try:
            pyarrow.fs.copy_files(run, str(found))
        except (OSError, ValueError) as error:
            raise ValueError(f"{run}: cannot be read ({str(error).splitlines()[0]})") from None
    elif not found.is_dir():
        uri = default_uri(Path.cwd())
        prepare_store(uri)
        found = fetch_checkpoint(uri, run)
    if not is_whole(found):
        raise ValueError(f"{run}: not a whole checkpoint folder (its manifest does not fit)")
    return found.resolve()
