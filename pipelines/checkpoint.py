"""A checkpoint is a folder: enough to resume exactly, to evaluate, to embed; nothing in it is ever unpickled.

learner.safetensors   all weights and buffers, the frozen backbone's too
optimizer.pt          optimizer and schedule (tensors and plain containers, read with weights_only)
state.json            finished epochs (with the seed, that is the sampler's position and the state of every generator:
                      all of them are derived from seed, epoch and step), the best epoch so far
history.json          every metric of every step and epoch so far
config.yaml  metrics.json  classes.json
manifest.json         size and sha256 of each of these, written last: a torn folder has none that fits
"""

import hashlib
import json
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
    """Where training stands: `epoch` epochs are done; the best of those evaluated, and its score."""

    epoch: int = 0
    best_epoch: int = 0
    best_score: float = -1.0


class Loaded(NamedTuple):
    state: State
    history: list[dict[str, Any]]
    metrics: dict[str, float]


def folder_name(epoch: int) -> str:
    return f"epoch_{epoch:05d}"


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
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in learner.state_dict().items()}
    save_file(weights, folder / "learner.safetensors")
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


def read_metrics(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text())


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
    state = State(**json.loads((folder / "state.json").read_text()))
    return Loaded(state, json.loads((folder / "history.json").read_text()), read_metrics(folder))


def newest(filesystem: pyarrow.fs.FileSystem, run: str, scratch: Path) -> Path | None:
    """The newest whole checkpoint below a run's folder, here or in a bucket; torn ones are passed over.

    A checkpoint that is not in a local folder is copied to `scratch` first.
    """
    selector = pyarrow.fs.FileSelector(run, allow_not_found=True)
    names = sorted(f.base_name for f in filesystem.get_file_info(selector) if f.base_name.startswith("epoch_"))
    for name in reversed(names):
        folder = fetch(filesystem, f"{run}/{name}", scratch)
        if whole(folder):
            return folder
    return None


def fetch(filesystem: pyarrow.fs.FileSystem, path: str, scratch: Path) -> Path:
    """A local folder with the content of a checkpoint."""
    if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        return Path(path)
    folder = scratch / Path(path).name
    pyarrow.fs.copy_files(path, str(folder), source_filesystem=filesystem)
    return folder


def _fingerprint(path: Path) -> tuple[int, str]:
    with open(path, "rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
