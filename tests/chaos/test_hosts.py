"""Three hosts with networks and mounts of their own. Needs root (`ip netns`).

.venv/bin/python -m pytest tests/chaos/test_hosts.py -s
"""

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.config.recipe import load_recipe
from pipelines.console import QUIET
from pipelines.runs.train import run_training
from tests.chaos.hosts import NET, Host, hosts
from tests.chaos.losses import assert_as_undisturbed, newest
from tests.chaos.machines import Training, quietly
from tests.chaos.test_chaos import SHORT
from tests.server import Server


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """MLflow for all hosts; asked from here by loopback."""
    folder = tmp_path / "mlflow"
    folder.mkdir()
    made = Server(folder, "0.0.0.0")
    made.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.uri)
    yield made
    made.stop()


def training_on(host: Host) -> bool:
    return any("RayTrainWorker" in "".join(quietly(process.cmdline)) for process in host.processes())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_folder_that_a_host_does_not_see_and_a_cable_that_is_pulled(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DML_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    given = [f"storage={tmp_path / 'calm'}", "name=calm", "workers=1"]
    expected = run_training(load_recipe(SHORT[0], [*SHORT[1:], *given]), QUIET, True)
    unseen = tmp_path / "unseen"
    unseen.mkdir()
    with hosts([[], [unseen], [unseen]]) as (address, (head, *others)):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri.replace("127.0.0.1", f"{NET}.1"))
        asked = [*SHORT, "workers=2", "wait_for_nodes=60", "timeout=20", "max_failures=0"]
        refused = Training(tmp_path, address, [*asked, f"storage={unseen}", "name=unseen"], head.shell)
        assert refused.process.wait(200) == 1
        told = refused.log.read_text()
        assert re.search(r"storage: (node \S+|a node) does not see .* all nodes (must )?share", told), told

        asked[-1] = "max_failures=3"
        training = Training(tmp_path, address, [*asked, "name=cable"], head.shell)
        run = tmp_path / "runs" / "cable"
        training.wait_for(lambda: newest(run))
        started, at = time.monotonic(), newest(run)
        next(host for host in others if training_on(host)).unplug()
        training.wait_for(lambda: newest(run) > at)
        print(f"{time.monotonic() - started:.1f} s from the cable to the next checkpoint", flush=True)
        training.read_job(600)
        outcome = json.loads(training.out.read_text().splitlines()[-1])
    os.environ["MLFLOW_TRACKING_URI"] = server.uri
    assert_as_undisturbed(server.uri, outcome, expected)
