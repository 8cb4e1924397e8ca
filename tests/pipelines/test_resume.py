"""Killed in the middle and started again: bit for bit the run that nobody killed."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import psutil
import pytest
from mlflow.entities import Run
from rich.console import Console

from pipelines import jobs
from pipelines.recipe import load

RUN = ["glyphs", "data.limit_classes=20", "batch.classes=4", "batch.images=4", "epochs=6", "steps_per_epoch=12"]
# The kills come after epochs 2 and 4, the variation is estimated before 2, 4 and 6: each resumes between two estimates.
RUN += ["evaluate_every=2", "workers=2", "method=[iaa,sgar,namr]", "iaa.start_epoch=1", "iaa.update_every=2"]


class Command:
    """`dml train` in a process group of its own, as a user starts it."""

    def __init__(self, folder: Path, name: str):
        ours = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")
        environment = {key: value for key, value in os.environ.items() if key not in ours}
        self.log, self.run_folder = folder / f"{name}.log", folder / "runs" / name
        with open(self.log, "ab") as log:
            command = [sys.executable, "-m", "pipelines.cli", "train", *RUN, f"name={name}"]
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> int:
        return self.process.wait(240)

    def wait_for_checkpoint(self, epoch: int) -> None:
        manifest = self.run_folder / f"epoch_{epoch:05d}" / "manifest.json"
        deadline = time.monotonic() + 200
        while not manifest.exists():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(0.05)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def run_of(name: str) -> Run:
    """The run of that name in the sqlite file of the working folder."""
    client = mlflow.MlflowClient(f"sqlite:///{Path.cwd() / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("glyphs").experiment_id
    (run,) = client.search_runs([experiment], f"attributes.run_name = '{name}'")
    return run


def status(name: str) -> str:
    return run_of(name).info.status


def histories(name: str) -> dict[str, list[tuple[int, float]]]:
    client, run = mlflow.MlflowClient(f"sqlite:///{Path.cwd() / 'mlflow.db'}"), run_of(name)
    return {
        key: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
        for key in run.data.metrics
        if "per_second" not in key
    }


def train(name: str) -> None:
    jobs.train(load(RUN[0], [*RUN[1:], f"name={name}"]), Console(file=io.StringIO()))


@pytest.mark.timeout(900)
def test_killed_stopped_and_continued_is_the_run_that_nobody_touched(
    tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    killed = Command(tmp_path, "touched")
    killed.wait_for_checkpoint(2)
    everyone = killed.descendants()
    os.killpg(killed.process.pid, signal.SIGKILL)
    for process in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    killed.process.wait()
    assert not (killed.run_folder / "epoch_00006").exists()

    stopped = Command(tmp_path, "touched")
    stopped.wait_for_checkpoint(4)
    everyone = stopped.descendants()
    os.kill(stopped.process.pid, signal.SIGINT)
    assert stopped.wait() == 130
    assert "the same command again continues it" in stopped.log.read_text()
    assert "Traceback" not in stopped.log.read_text()
    psutil.wait_procs(everyone, timeout=20)
    assert not [p for p in everyone if p.is_running()], "Ray that we started was left running"
    assert status("touched") == "KILLED"

    train("touched")
    train("whole")
    assert status("touched") == status("whole") == "FINISHED"
    one, other = histories("touched"), histories("whole")
    assert len(one["train/step_loss"]) == 72
    for key in {*one, *other}:
        assert sorted(one[key]) == sorted(other[key]), key
