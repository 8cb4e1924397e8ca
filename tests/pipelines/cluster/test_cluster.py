"""No machine when it starts, then three, one of them lost on the way: the training nobody disturbed. More of it, and
longer: tests/chaos."""

import json
import random
from pathlib import Path

import pytest

from pipelines.config.recipe import load_recipe
from pipelines.console import QUIET
from pipelines.runs.train import run_training
from tests.chaos.losses import assert_as_undisturbed, lose, newest
from tests.chaos.machines import Training, machines, nothing_left
from tests.pipelines.conftest import EXACT

# Of many workers, one may be lost and another found: the bits of float32 stay.
CALM = [*(argument for argument in EXACT if "precision" not in argument), "precision=float32"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_node_changes_nothing(tracked_folder: Path, tmp_path: Path, mlflow_server) -> None:
    expected = run_training(load_recipe(CALM[0], [*CALM[1:], "workers=1", "name=calm"]), QUIET, here=True)
    run = tmp_path / "runs" / "lost"
    with machines(0) as cluster:
        refused = Training(tmp_path, cluster.address, [*CALM, "workers=2", "use_gpu=true", "wait_for_nodes=1"])
        assert refused.process.wait(120) == 2
        assert "use_gpu=true: each of workers=2 needs a GPU, the cluster has 0 after 1 s" in refused.log.read_text()
        training = Training(tmp_path, cluster.address, [*CALM, "workers=2:3", "name=lost", "wait_for_nodes=100"])
        training.wait_for(lambda: "waiting for nodes, 100 s at most: workers=2:3" in training.log.read_text())
        for _ in range(3):
            cluster.add(cpus=2)
        training.wait_for(lambda: newest(run))
        seen = {process.pid for process in cluster.processes()}
        lose("node", cluster, training, random.Random(0))
        training.read_job(300)
        outcome = json.loads(training.out.read_text().splitlines()[-1])
    assert_as_undisturbed(mlflow_server.uri, outcome, expected)
    nothing_left(seen)
