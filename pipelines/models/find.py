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
    """Find the checkpoint folder that a name means; one that is elsewhere is copied until this process ends.

    Args:
        run: An MLflow run id, a checkpoint folder or its URL in a bucket, or models:/NAME@ALIAS.

    Raises:
        ValueError: It is not there, or it is torn.
    """
    folder = Path(run)
    if "://" in run:
        folder = Path(tempfile.mkdtemp(prefix="dml-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        try:
            pyarrow.fs.copy_files(run, str(folder))
        except (OSError, ValueError) as error:
            raise ValueError(f"{run}: cannot be read ({str(error).splitlines()[0]})") from None
    elif not folder.is_dir():
        uri = default_uri(Path.cwd())
        prepare_store(uri)
        folder = fetch_checkpoint(uri, run)
    if not is_whole(folder):
        raise ValueError(f"{run}: not a whole checkpoint folder (its manifest does not fit)")
    return folder.resolve()
