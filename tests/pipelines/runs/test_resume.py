"""Killed in the middle and started again: bit for bit the run that nobody killed."""

import contextlib
import json
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

from pipelines.config.recipe import load_recipe
from pipelines.console import QUIET
from pipelines.runs.outcome import TrainOutcome
from pipelines.runs.train import run_training
from tests.pipelines.conftest import EXACT

TOUCHED = ["workers=2", "name=touched"]


class Command:
    """`dml train` in a process group of its own, as a user starts it."""

    def __init__(self, folder: Path):
        ours = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")
        environment = {key: value for key, value in os.environ.items() if key not in ours}
        self.log, self.run_folder = folder / "log", folder / "runs" / "touched"
        self.before = {*self.run_folder.glob("epoch_*/manifest.json")}
        with open(self.log, "ab") as log:
            command = [sys.executable, "-m", "pipelines.cli", "train", *EXACT, *TOUCHED]
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> int:
        return self.process.wait(240)

    def wait_for_checkpoint(self) -> None:
        """One that was not there when the command began."""
        deadline = time.monotonic() + 200
        while not {*self.run_folder.glob("epoch_*/manifest.json")} - self.before:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(0.05)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def only_run() -> tuple[mlflow.MlflowClient, Run]:
    """Of the sqlite file in the working folder."""
    client = mlflow.MlflowClient(f"sqlite:///{Path.cwd() / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("glyphs").experiment_id])
    return client, run


def histories(client: mlflow.MlflowClient, run: Run) -> dict[str, list[tuple[int, float]]]:
    return {
        key: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, key))
        for key in run.data.metrics
        if "_second" not in key and "data_wait" not in key
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_stopped_and_continued_is_the_run_that_nobody_touched(
    tmp_path: Path, exact: dict[int, TrainOutcome], mlflow_server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time between two estimates of the variation (IAA), whose schedule goes on as well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    killed = Command(tmp_path)
    killed.wait_for_checkpoint()
    everyone = killed.descendants()
    os.killpg(killed.process.pid, signal.SIGKILL)
    for process in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    killed.process.wait()
    assert not (killed.run_folder / "epoch_00006").exists()

    stopped = Command(tmp_path)
    stopped.wait_for_checkpoint()
    everyone = stopped.descendants()
    os.kill(stopped.process.pid, signal.SIGINT)
    assert stopped.wait() == 130
    assert "the same command again continues it" in stopped.log.read_text()
    assert "Traceback" not in stopped.log.read_text()
    psutil.wait_procs(everyone, timeout=20)
    assert not [p for p in everyone if p.is_running()], "Ray that we started was left running"
    assert only_run()[1].info.status == "KILLED"

    outcome = run_training(load_recipe(EXACT[0], [*EXACT[1:], *TOUCHED]), QUIET)
    client, run = only_run()
    assert run.info.status == "FINISHED"
    there = mlflow.MlflowClient(mlflow_server.uri)
    one, other = histories(client, run), histories(there, there.get_run(exact[2].run_id))
    assert len(one["train/step_loss"]) == 48
    for key in {*one, *other}:
        assert one[key] == other[key], key
    manifests = [json.loads(Path(o.checkpoint, "manifest.json").read_text()) for o in (outcome, exact[2])]
    assert manifests[0]["learner.safetensors"] == manifests[1]["learner.safetensors"]
