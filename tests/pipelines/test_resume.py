"""Killed in the middle and started again: bit for bit the run that nobody killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import psutil
import pytest

RUN = ["glyphs", "data.limit_classes=20", "batch.classes=4", "batch.images=4", "epochs=6", "steps_per_epoch=12"]
RUN += ["evaluate_every=2", "workers=2"]


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


def histories(folder: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("glyphs")
    (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    assert run.info.status == "FINISHED"
    return {
        key: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
        for key in run.data.metrics
        if "per_second" not in key
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    return tmp_path_factory.mktemp("resume")


def test_sigkill_in_the_middle_changes_no_bit(folder: Path) -> None:
    killed = Command(folder, "killed")
    killed.wait_for_checkpoint(2)
    everyone = killed.descendants()
    os.killpg(killed.process.pid, signal.SIGKILL)
    for process in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    killed.process.wait()
    assert not (killed.run_folder / "result.json").exists()
    assert Command(folder, "killed").wait() == 0
    whole = Command(folder, "whole")
    assert whole.wait() == 0, whole.log.read_text()
    one, other = histories(folder, "killed"), histories(folder, "whole")
    assert len(one["train/step_loss"]) == 72
    for key in {*one, *other}:
        assert sorted(one[key]) == sorted(other[key]), key


def test_ctrl_c_ends_it_and_tells_how_to_go_on(folder: Path) -> None:
    stopped = Command(folder, "stopped")
    stopped.wait_for_checkpoint(2)
    everyone = stopped.descendants()
    os.kill(stopped.process.pid, signal.SIGINT)
    assert stopped.wait() == 130
    assert "the same command again continues it" in stopped.log.read_text()
    assert "Traceback" not in stopped.log.read_text()
    psutil.wait_procs(everyone, timeout=20)
    assert not [p for p in everyone if p.is_running()], "Ray that we started was left running"
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("glyphs").experiment_id
    runs = client.search_runs([experiment], "attributes.run_name = 'stopped'")
    assert [run.info.status for run in runs] == ["KILLED"]
