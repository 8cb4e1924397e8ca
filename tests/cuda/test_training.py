"""`dml train` on a GPU that is there: the same digits twice, and of a run that was interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
RUN = ["glyphs", "data.limit_classes=12", "batch.classes=4", "batch.images=4", "epochs=6", "steps_per_epoch=8"]
RUN += ["method=[iaa,sgar,namr]", "iaa.start=0.2", "iaa.update_every=2"]
OF_TIME = {"train/images_per_second", "train/data_wait", "train/startup_seconds"}


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    ours = {"MLFLOW_TRACKING_URI", "RAY_ADDRESS"}
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    command = [sys.executable, "-m", "pipelines.cli", "train", *RUN, *arguments, "--json"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def metrics_of(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    """What a command measured but for times, and what it said on the way."""
    out, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    metrics = json.loads(out.splitlines()[-1])["metrics"]
    return {name: value for name, value in metrics.items() if name not in OF_TIME}, said


@pytest.mark.timeout(900)
def test_a_run_has_the_same_digits_twice_and_when_it_was_interrupted(cache: Path, tmp_path: Path) -> None:
    expected, said = metrics_of(start(tmp_path, "name=whole"))
    assert " on GPUs (auto: one on each GPU)" in said and "precision=bf16" in said
    assert "kernel by kernel" not in said
    assert metrics_of(start(tmp_path, "name=again"))[0] == expected

    process = start(tmp_path, "name=stopped")
    while not [*tmp_path.glob("runs/stopped/epoch_*/manifest.json")]:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert metrics_of(start(tmp_path, "name=stopped"))[0] == expected


@pytest.mark.parametrize("loss", ["contrastive", "triplet", "margin", "proxy_anchor"])
def test_own_losses_are_recorded(cache: Path, tmp_path: Path, loss: str) -> None:
    short = ["epochs=2", "iaa.start=0", "steps_per_epoch=3", f"loss.name={loss}", f"name={loss}"]
    _, said = metrics_of(start(tmp_path, *short))
    assert "kernel by kernel" not in said
