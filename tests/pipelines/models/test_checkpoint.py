import json
import resource
import signal
from pathlib import Path

import pyarrow.fs
import pytest
import torch
from torch import nn

from dml_core.data.datasets import SetIdentity
from pipelines.config.recipe import load_recipe
from pipelines.models import checkpoint
from pipelines.models.checkpoint import TrainingState, is_whole, read_class_names, read_config
from pipelines.models.run_folder import checkpoint_name, keep_checkpoint, newest_checkpoint


class Parts:
    """A small network in the middle of its training."""

    def __init__(self, seed: int):
        torch.manual_seed(seed)
        self.network = nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.network.parameters())
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.network(torch.ones(1, 3)).square().sum().backward()
        self.optimizer.step()
        self.schedule.step()


SET = SetIdentity("d", "p", "l", 3, 7)


def save(folder: Path, parts: Parts, epoch: int = 2) -> Path:
    state = TrainingState(epoch, 1, 0.5)
    history = [{"step": 1, "metrics": {"a": 0.1}}]
    folder = folder / checkpoint_name(epoch)
    names = ("x", "ü/y")
    checkpoint.save(
        *(
            folder,
            load_recipe("glyphs", []),
            SET,
            names,
            parts.network,
            parts.optimizer,
            parts.schedule,
            state,
            history,
        ),
        *({"m": 1 / 3}, torch.tensor([[0.1, 0.2]], dtype=torch.float64)),
    )
    return folder


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    one, other = Parts(0), Parts(1)
    for _ in range(3):
        one.step()
    folder = save(tmp_path, one)
    found = checkpoint.load(folder, other.network, other.optimizer, other.schedule)
    one.step()
    other.step()
    assert all((a == b).all() for a, b in zip(one.network.parameters(), other.network.parameters(), strict=True))
    assert found.state == TrainingState(2, 1, 0.5) and found.steps.tolist() == [[0.1, 0.2]]
    assert json.loads((folder / "metrics.json").read_text()) == {"m": 1 / 3}
    assert read_config(folder) == load_recipe("glyphs", [])
    assert read_class_names(folder) == ("x", "ü/y")


def test_torn_checkpoints_are_passed_over(tmp_path: Path) -> None:
    parts, files = Parts(0), pyarrow.fs.LocalFileSystem()
    assert newest_checkpoint(files, str(tmp_path / "none")) is None
    folders = [save(tmp_path, parts, epoch) for epoch in (1, 2, 3, 10)]
    assert newest_checkpoint(files, str(tmp_path)) == "epoch_00010"
    (folders[3] / "manifest.json").unlink()
    weights = folders[2] / "learner.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert newest_checkpoint(files, str(tmp_path)) == "epoch_00002"
    (folders[1] / "optimizer.pt").unlink()
    assert newest_checkpoint(files, str(tmp_path)) == "epoch_00001"


def test_the_best_and_the_last_two_are_kept(tmp_path: Path) -> None:
    files, run = pyarrow.fs.LocalFileSystem(), tmp_path / "run"
    for epoch, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 5)):
        made = save(tmp_path / "made", Parts(0), epoch)
        keep_checkpoint(files, str(run), made, TrainingState(epoch, best, 0.5))
        kept = {int(path.name[-1]) for path in run.iterdir()}
        assert kept == {best, epoch, *({epoch - 1} if epoch > 1 else ())}
        assert all(is_whole(path) for path in run.iterdir())


def test_a_disk_that_is_full_leaves_nothing_half_written(tmp_path: Path) -> None:
    files, run, made = pyarrow.fs.LocalFileSystem(), tmp_path / "run", save(tmp_path / "made", Parts(0), 1)
    ignored, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # no file above 100 bytes
    try:
        with pytest.raises(OSError, match="Error writing"):
            keep_checkpoint(files, str(run), made, TrainingState(1, 1, 0.5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(run.iterdir()) == []


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path(tmp_path / "ran").touch, ())

    parts = Parts(0)
    folder = save(tmp_path, parts)
    torch.save({"optimizer": Evil(), "schedule": {}}, folder / "optimizer.pt")
    with pytest.raises(Exception, match="weights_only"):
        checkpoint.load(folder, parts.network, parts.optimizer, parts.schedule)
    assert not (tmp_path / "ran").exists()


def test_manifest_covers_every_file(tmp_path: Path) -> None:
    folder = save(tmp_path, Parts(0))
    listed = json.loads((folder / "manifest.json").read_text())
    assert set(listed) | {"manifest.json"} == {path.name for path in folder.iterdir()}
