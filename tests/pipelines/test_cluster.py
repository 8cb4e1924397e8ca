"""Three machines, one of them lost on the way: the training nobody disturbed. More of it, and longer: tests/chaos."""

import json
import random
from pathlib import Path

import pytest

from pipelines import jobs
from tests.chaos.losses import assert_as_undisturbed, lose, newest
from tests.chaos.machines import Training, machines, nothing_left
from tests.pipelines.conftest import EXACT


@pytest.mark.timeout(900)
def test_a_lost_node_changes_nothing(
    exact: dict[int, jobs.Outcome], tracked_folder: Path, tmp_path: Path, mlflow_server
) -> None:
    run = tmp_path / "runs" / "lost"
    with machines(3, cpus=2) as cluster:
        training = Training(tmp_path, cluster.address, [*EXACT, "workers=2", "name=lost"])
        training.wait_for(lambda: newest(run))
        seen = {process.pid for process in cluster.processes()}
        lose("node", cluster, training, random.Random(0))
        training.wait_for_end(300)
        outcome = json.loads(training.out.read_text().splitlines()[-1])
    assert_as_undisturbed(mlflow_server.uri, outcome, exact[2])
    nothing_left(seen)
