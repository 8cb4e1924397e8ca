"""The folder of a run or a sweep in `storage`, here or in a bucket: its checkpoints and small JSON files."""

import contextlib
import json
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs

from pipelines.config.schema import Config
from pipelines.models.checkpoint import TrainingState, is_whole, read_state


def locate(config: Config) -> tuple[pyarrow.fs.FileSystem, str]:
    """Return the file system and the path of a run's folder, storage/NAME. OSError or ValueError: no such storage."""
    files, root = pyarrow.fs.FileSystem.from_uri(config.storage)
    return files, f"{root}/{config.name}"


def checkpoint_name(epoch: int, step: int = 0) -> str:
    """Return the name of a checkpoint's folder; names sort by time."""
    return f"epoch_{epoch:05d}" + (f"_step_{step:07d}" if step else "")


def keep_checkpoint(files: pyarrow.fs.FileSystem, run: str, folder: Path, state: TrainingState) -> None:
    """Add a saved checkpoint to a run's folder, and delete older ones but the best and, should this one tear, the last.

    Args:
        files: The file system.
        run: Path of the run's folder.
        folder: The checkpoint, on this machine.
        state: How far its training is.
    """
    path = f"{run}/{checkpoint_name(state.epoch, state.step)}"
    files.create_dir(path, recursive=True)
    try:
        pyarrow.fs.copy_files(str(folder), path, destination_filesystem=files)
    except OSError:
        files.delete_dir(path)  # a full disk: nothing half-written
        raise
    names = checkpoint_names(files, run)
    for name in {*names[:-2]} - {checkpoint_name(state.best_epoch)}:
        files.delete_dir(f"{run}/{name}")


def checkpoint_names(files: pyarrow.fs.FileSystem, run: str) -> list[str]:
    """List the checkpoints in a run's folder by name, oldest first, whole or torn."""
    selector = pyarrow.fs.FileSelector(run, allow_not_found=True)
    return sorted(f.base_name for f in files.get_file_info(selector) if f.base_name.startswith("epoch_"))


def newest_checkpoint(files: pyarrow.fs.FileSystem, run: str) -> str | None:
    """Return the name of the newest whole checkpoint of a run; None where there is none. Torn ones are passed over."""
    for name in reversed(checkpoint_names(files, run)):
        with local_copy(files, f"{run}/{name}") as folder:
            if is_whole(folder):
                return name
    return None


def best_checkpoint(files: pyarrow.fs.FileSystem, run: str) -> str | None:
    """Return the name of the checkpoint of a run's best epoch so far; None where it has no whole checkpoint."""
    newest = newest_checkpoint(files, run)
    if newest is None:
        return None
    with local_copy(files, f"{run}/{newest}") as folder:
        best = read_state(folder).best_epoch
    return checkpoint_name(best) if best else newest  # before the first validation there is no best


@contextlib.contextmanager
def local_copy(files: pyarrow.fs.FileSystem, path: str) -> Iterator[Path]:
    """Yield a local folder with the content of a checkpoint: itself, or a copy for the time of the block."""
    if isinstance(files, pyarrow.fs.LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="dml-") as scratch:
        pyarrow.fs.copy_files(path, scratch, source_filesystem=files)
        yield Path(scratch)


def read_json(files: pyarrow.fs.FileSystem, path: str) -> Any:
    """Read a JSON file of a run's or a sweep's folder.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged.
    """
    with files.open_input_stream(path) as file:
        content = file.read()
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); restore it, or choose another name") from None


class RunFolder:
    """The folder storage/NAME: run.json (id and config), checkpoints, result.json at the end, logs/ where it is local.

    Attributes:
        filesystem, path: Where it is.
        logs: Folder for logs; None in a bucket.
    """

    def __init__(self, config: Config):
        """Find the folder, and make its parent. ValueError where it cannot be written to."""
        try:
            self.filesystem, self.path = locate(config)
            self.filesystem.create_dir(str(Path(self.path).parent), recursive=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"storage={config.storage}: cannot be written to ({error})") from None
        self.logs = Path(self.path) / "logs" if isinstance(self.filesystem, pyarrow.fs.LocalFileSystem) else None

    def read(self, name: str) -> dict[str, Any] | None:
        """Read a JSON file of the folder; None where there is none. ValueError where it is damaged."""
        try:
            return read_json(self.filesystem, f"{self.path}/{name}")
        except FileNotFoundError:
            return None

    def delete_checkpoints(self, except_of: Container[str]) -> None:
        """Delete the checkpoints of all runs in a sweep's folder but the named ones, and their starts.

        Their other files stay, and so does the start of the sweep itself.
        """
        for entry in self.filesystem.get_file_info(pyarrow.fs.FileSelector(self.path, recursive=True)):
            run, name = Path(entry.path).parts[-2:]
            if entry.is_file or run in except_of or entry.path == f"{self.path}/start":
                continue
            if name == "start" or name.startswith(("epoch_", "checkpoint_")):
                self.filesystem.delete_dir(entry.path)

    def write(self, name: str, content: dict[str, Any] | str) -> None:
        """Write a text, or a dictionary as JSON: whole or not at all."""
        text = content if isinstance(content, str) else json.dumps(content, indent=1)
        self.filesystem.create_dir(self.path, recursive=True)
        with self.filesystem.open_output_stream(f"{self.path}/{name}.partial") as file:
            file.write(text.encode())
        self.filesystem.move(f"{self.path}/{name}.partial", f"{self.path}/{name}")
