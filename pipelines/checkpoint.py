"""A checkpoint is a folder: enough to resume exactly, to evaluate, to embed; nothing in it is ever unpickled.

learner.safetensors   all weights and buffers, the frozen backbone's too
optimizer.pt          optimizer and schedule (tensors and plain containers, read with weights_only)
epoch.safetensors     terms and gradient norms of the steps of an epoch that is not finished; none: those of no step
state.json            finished epochs, and steps of the next (with the seed, that is the sampler's position and the
                      state of every generator: all derived from seed, epoch and step), the best epoch so far
history.json          every metric of every step and epoch so far
config.yaml  metrics.json  classes.json
manifest.json         size and sha256 of each of these, written last: a torn folder has none that fits
"""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.fs
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipelines.config import Config
from pipelines.recipe import parse, read_yaml, to_yaml

MANIFEST = "manifest.json"


class State(NamedTuple):
    """Where training stands: `epoch` epochs are done, and `step` steps of the next; of those evaluated the best, and
    its score."""

    epoch: int = 0
    best_epoch: int = 0
    best_score: float = -1.0
    step: int = 0


class Loaded(NamedTuple):
    """steps: (state.step, T + 1), of the epoch under way: the T terms of each step, and the gradient's norm."""

    state: State
    history: list[dict[str, Any]]
    steps: torch.Tensor


def run_folder(config: Config) -> tuple[pyarrow.fs.FileSystem, str]:
    """Where a run's files are: storage/NAME. OSError or ValueError where that cannot be."""
    files, root = pyarrow.fs.FileSystem.from_uri(config.storage)
    return files, f"{root}/{config.name}"


def folder_name(epoch: int, step: int = 0) -> str:
    """Names sort by time."""
    return f"epoch_{epoch:05d}" + (f"_step_{step:07d}" if step else "")


def save(
    folder: Path,
    config: Config,
    class_names: tuple[str, ...],
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    state: State,
    history: list[dict[str, Any]],
    metrics: dict[str, float],
    steps: torch.Tensor,
) -> None:
    """steps: as in Loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in learner.state_dict().items()}
    save_file(weights, folder / "learner.safetensors")
    save_file({"steps": steps.contiguous()}, folder / "epoch.safetensors")
    torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, folder / "optimizer.pt")
    (folder / "config.yaml").write_text(to_yaml(config))
    for name, content in (
        ("state.json", state._asdict()),
        ("history.json", history),
        ("metrics.json", metrics),
        ("classes.json", class_names),
    ):
        (folder / name).write_text(json.dumps(content))
    files = {path.name: _fingerprint(path) for path in folder.iterdir()}
    (folder / MANIFEST).write_text(json.dumps(files))


def keep(files: pyarrow.fs.FileSystem, run: str, folder: Path, state: State) -> None:
    """Add a saved checkpoint to a run's folder; of those before it keep the best, and the last should this one tear."""
    path = f"{run}/{folder_name(state.epoch, state.step)}"
    files.create_dir(path, recursive=True)
    try:
        pyarrow.fs.copy_files(str(folder), path, destination_filesystem=files)
    except OSError:
        files.delete_dir(path)  # a full disk: nothing half-written
        raise
    kept = names(files, run)
    for name in {*kept[:-2]} - {folder_name(state.best_epoch)}:
        files.delete_dir(f"{run}/{name}")


def names(files: pyarrow.fs.FileSystem, run: str) -> list[str]:
    """Of the checkpoints below a run's folder, oldest first, whole or torn."""
    selector = pyarrow.fs.FileSelector(run, allow_not_found=True)
    return sorted(f.base_name for f in files.get_file_info(selector) if f.base_name.startswith("epoch_"))


def whole(folder: Path) -> bool:
    """Whether every file is there as it was written."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        return all(_fingerprint(folder / name) == tuple(print_) for name, print_ in files.items())
    except (OSError, ValueError):
        return False


def read_config(folder: Path) -> Config:
    return parse(read_yaml((folder / "config.yaml").read_text()))


def read_class_names(folder: Path) -> tuple[str, ...]:
    return tuple(json.loads((folder / "classes.json").read_text()))


def read_history(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "history.json").read_text())


def read_state(folder: Path) -> State:
    return State(**json.loads((folder / "state.json").read_text()))


def load_weights(folder: Path, learner: nn.Module) -> None:
    learner.load_state_dict(load_file(folder / "learner.safetensors"))


def load(
    folder: Path,
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> Loaded:
    """Put everything back as it was when the folder was saved."""
    load_weights(folder, learner)
    states = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(states["optimizer"])
    schedule.load_state_dict(states["schedule"])
    steps = load_file(folder / "epoch.safetensors")["steps"]
    return Loaded(read_state(folder), read_history(folder), steps)


def newest(files: pyarrow.fs.FileSystem, run: str) -> str | None:
    """The name of the newest whole checkpoint below a run's folder, here or in a bucket; torn ones are passed over."""
    for name in reversed(names(files, run)):
        with fetched(files, f"{run}/{name}") as folder:
            if whole(folder):
                return name
    return None


@contextlib.contextmanager
def fetched(files: pyarrow.fs.FileSystem, path: str) -> Iterator[Path]:
    """A local folder with the content of a checkpoint: itself, or a copy for the time of the block."""
    if isinstance(files, pyarrow.fs.LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="dml-") as scratch:
        pyarrow.fs.copy_files(path, scratch, source_filesystem=files)
        yield Path(scratch)


def _fingerprint(path: Path) -> tuple[int, str]:
    with open(path, "rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
