"""Any number of workers, and any numbers one after the other: the same bits of all weights and losses, in float32."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from pipelines.cluster.worker import Worker
from pipelines.config.identity import with_slices
from pipelines.config.recipe import load_recipe
from pipelines.models.checkpoint import read_history
from pipelines.models.run_folder import checkpoint_name
from pipelines.training.job import TrainingJob
from pipelines.training.loop import train_loop
from tests import ranks

GLYPHS = ["data.limit_classes=12", "batch.classes=4", "batch.images=4", "batch.slices=8", "steps_per_epoch=4"]
GLYPHS += ["use_gpu=false", "precision=float32"]
METHODS = {"alone": [], "all": ["method=[iaa,sgar,namr]", "iaa.start=0", "iaa.update_every=1"]}
EPOCHS = 3


class KillAfter:
    """Reports of a worker that is killed when an epoch is stored, as a machine that goes away would end it."""

    def __init__(self, epoch: int):
        self.epoch = epoch

    def __call__(self, metrics: dict[str, float]) -> None:
        if metrics["epoch"] == self.epoch:
            os.kill(os.getpid(), signal.SIGKILL)


def train_in_group(job: TrainingJob, cache: Path) -> None:
    os.environ["DML_CACHE"] = str(cache)
    train_loop(job)


def train(
    methods: str, workers: int, name: str, folder: Path, cache: Path, kill_after: int = 0, more: Sequence[str] = ()
) -> None:
    """Run the loop that Ray's workers run, in a group of real processes without Ray. more: further config values."""
    values = [
        *GLYPHS,
        *METHODS[methods],
        *more,
        f"epochs={EPOCHS}",
        f"workers={workers}",
        f"name={name}",
        f"storage={folder}",
    ]
    config = with_slices(load_recipe("glyphs", values), None)
    ranks.run(
        train_in_group, workers, TrainingJob(config, test=False, worker=Worker(report=KillAfter(kill_after))), cache
    )


def assert_same_bits(one: Path, other: Path) -> None:
    """Of the weights, the statistics and all losses of two runs."""
    epochs = [folder / checkpoint_name(EPOCHS) for folder in (one, other)]
    weights, expected = (load_file(epoch / "learner.safetensors") for epoch in epochs)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
    losses, expected_losses = ([record["step_loss"] for record in read_history(epoch)] for epoch in epochs)
    assert losses == expected_losses and len({loss for epoch in losses for loss in epoch}) == 4 * EPOCHS
    scores = [[record["metrics"]["val/map_at_r"] for record in read_history(epoch)] for epoch in epochs]
    assert scores[0] == scores[1]


@pytest.fixture(scope="module", params=[*METHODS])
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[str, Path]:
    """The name of the methods, and a folder with the run of one process."""
    folder = tmp_path_factory.mktemp("bits")
    train(request.param, 1, "on1", folder, cache)
    return request.param, folder


@pytest.mark.parametrize("workers", [2, 3, 4, 5, 7])
def test_any_number_of_workers_gives_the_same_bits(alone: tuple[str, Path], workers: int, cache: Path) -> None:
    methods, folder = alone
    train(methods, workers, f"on{workers}", folder, cache)
    assert_same_bits(folder / f"on{workers}", folder / "on1")


def test_three_workers_are_killed_and_one_goes_on_and_then_five(alone: tuple[str, Path], cache: Path) -> None:
    methods, folder = alone
    for workers, killed_after in ((3, 1), (1, 2)):
        with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
            train(methods, workers, "moved", folder, cache, killed_after)
    train(methods, 5, "moved", folder, cache)
    assert_same_bits(folder / "moved", folder / "on1")


def test_settings_that_change_on_the_way_change_alike_by_ddp(tmp_path: Path, cache: Path) -> None:
    """DistributedDataParallel is made once, and the learner anew when settings change."""
    change = ["precision=float64", "changes.1.sgar.intensity=0.5", "changes.2.loss.alpha=4"]
    for workers, gradients in ((1, "exact"), (3, "ddp")):
        train("all", workers, gradients, tmp_path, cache, more=[*change, f"gradients={gradients}"])
    exact, ddp = (read_history(tmp_path / name / checkpoint_name(EPOCHS)) for name in ("exact", "ddp"))
    for one, other in zip(exact, ddp, strict=True):
        assert other["step_loss"] == pytest.approx(one["step_loss"], rel=1e-9)
