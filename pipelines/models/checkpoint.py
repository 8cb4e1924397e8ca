"""A checkpoint is a folder: enough to resume exactly, to evaluate, to embed; nothing in it is ever unpickled.

learner.safetensors   all weights and buffers, the frozen backbone's too
optimizer.pt          optimizer and schedule (tensors and plain containers, read with weights_only)
epoch.safetensors     terms and gradient norms of the steps of an epoch that is not finished; none: those of no step
state.json            finished epochs, and steps of the next (with the seed, that is the sampler's position and the
                      state of every generator: all derived from seed, epoch and step), the best epoch so far
history.json          every metric of every step and epoch so far
data.json             what the set was, which digests tell from all others
config.yaml  metrics.json  classes.json
manifest.json         size and sha256 of each of these, written last: a torn folder has none that fits
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dml_core.data.datasets import SetIdentity
from pipelines.config.recipe import read_stored_config, to_yaml
from pipelines.config.schema import Config
from pipelines.tracking.records import EpochRecord

if TYPE_CHECKING:  # torch waits for the functions that need it: a checkpoint is found and refused without it
    import torch
    from torch import nn

MANIFEST = "manifest.json"
MODEL_FILES = ("learner.safetensors", "config.yaml", "classes.json")  # all that embedding takes


class TrainingState(NamedTuple):
    """How far a training is.

    Attributes:
        epoch: Finished epochs.
        best_epoch: The one of them with the best validation; the last, where nothing is validated.
        best_score: Its val/map_at_r; None where nothing has been validated.
        step: Steps done of the next epoch.
    """

    epoch: int = 0
    best_epoch: int = 0
    best_score: float | None = None
    step: int = 0


class LoadedCheckpoint(NamedTuple):
    """A checkpoint's content besides weights, optimizer and schedule.

    Attributes:
        state: How far the training was.
        history: A record of each finished epoch.
        steps: (state.step, T + 1) of the epoch under way: the T terms of each step, and the gradient's norm.
    """

    state: TrainingState
    history: list[EpochRecord]
    steps: "torch.Tensor"


def save(
    folder: Path,
    config: Config,
    data: SetIdentity,
    class_names: tuple[str, ...],
    learner: "nn.Module",
    optimizer: "torch.optim.Optimizer",
    schedule: "torch.optim.lr_scheduler.LRScheduler",
    state: TrainingState,
    history: list[EpochRecord],
    metrics: dict[str, float],
    steps: "torch.Tensor",
) -> None:
    """Write a checkpoint folder; its manifest last. Arguments as in TrainingState and LoadedCheckpoint."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in learner.state_dict().items()}
    save_file(weights, folder / "learner.safetensors")
    save_file({"steps": steps.contiguous()}, folder / "epoch.safetensors")
    torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, folder / "optimizer.pt")
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    for name, content in (
        ("state.json", state._asdict()),
        ("history.json", history),
        ("metrics.json", metrics),
        ("classes.json", class_names),
        ("data.json", data._asdict()),
    ):
        (folder / name).write_text(json.dumps(content))
    files = {path.name: _fingerprint(path) for path in folder.iterdir()}
    (folder / MANIFEST).write_text(json.dumps(files))


def is_whole(folder: Path) -> bool:
    """Return whether every file of a checkpoint folder is there as it was written."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        return all(_fingerprint(folder / name) == tuple(print_) for name, print_ in files.items())
    except (OSError, ValueError):
        return False


def read_config(folder: Path) -> Config:
    """Read the config that a checkpoint was trained by."""
    return read_stored_config((folder / "config.yaml").read_text(encoding="utf-8"))


def read_class_names(folder: Path) -> tuple[str, ...]:
    """Read the names of the training classes, in the order of their labels."""
    return tuple(json.loads((folder / "classes.json").read_text()))


def read_data(folder: Path) -> SetIdentity | None:
    """Read what the set of a checkpoint's training was; None where an earlier version, without digests, wrote it."""
    path = folder / "data.json"
    return SetIdentity(**json.loads(path.read_text())) if path.exists() else None


def read_history(folder: Path) -> list[EpochRecord]:
    """Read the records of the epochs up to a checkpoint."""
    return json.loads((folder / "history.json").read_text())


def read_state(folder: Path) -> TrainingState:
    """Read how far the training of a checkpoint was."""
    return TrainingState(**json.loads((folder / "state.json").read_text()))


def load_weights(folder: Path, learner: "nn.Module", loss: bool = True) -> None:
    """Load a checkpoint's weights and buffers into a learner built from its config. loss: with its base loss's."""
    from safetensors.torch import load_file

    state = load_file(folder / "learner.safetensors")
    learner.load_state_dict({name: state[name] for name in state if loss or not name.startswith("base_loss.")})


def load(
    folder: Path,
    learner: "nn.Module",
    optimizer: "torch.optim.Optimizer",
    schedule: "torch.optim.lr_scheduler.LRScheduler",
) -> LoadedCheckpoint:
    """Put weights, optimizer and schedule back as they were when the folder was saved, and read the rest."""
    import torch
    from safetensors.torch import load_file

    load_weights(folder, learner)
    states = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(states["optimizer"])
    schedule.load_state_dict(states["schedule"])
    steps = load_file(folder / "epoch.safetensors")["steps"]
    return LoadedCheckpoint(read_state(folder), read_history(folder), steps)


def _fingerprint(path: Path) -> tuple[int, str]:
    with open(path, "rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def model_fingerprint(folder: Path) -> str:
    """Return a hash of a checkpoint's model files, which tells the model from all others."""
    files = json.loads((folder / MANIFEST).read_text())
    return hashlib.sha256(json.dumps([files[name] for name in MODEL_FILES]).encode()).hexdigest()


def copy_model(folder: Path, into: Path) -> None:
    """Copy what an Embedder needs of a checkpoint; the copy is a whole checkpoint folder of the same fingerprint."""
    into.mkdir(parents=True)
    for name in MODEL_FILES:
        shutil.copyfile(folder / name, into / name)
    files = json.loads((folder / MANIFEST).read_text())
    (into / MANIFEST).write_text(json.dumps({name: files[name] for name in MODEL_FILES}))
