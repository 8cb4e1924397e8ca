"""Twenty losses in one training, five in `make test-slow`; faults one by one on three machines.

.venv/bin/python -m pytest tests/chaos -s      (CHAOS_KILLS and CHAOS_SEED set how many, and which)
"""

import json
import os
import random
import time
from pathlib import Path

import pytest

from pipelines.config.recipe import load_recipe
from pipelines.console import QUIET
from pipelines.models.checkpoint import is_whole
from pipelines.runs.outcome import TrainOutcome
from pipelines.runs.train import run_training
from tests.chaos.losses import assert_as_undisturbed, lose, newest
from tests.chaos.machines import Training, machines, nothing_left
from tests.sharing import make_once

# Long enough for twenty losses.
LONG = ["glyphs", "data.limit_classes=12", "batch.classes=6", "batch.images=4", "epochs=24", "steps_per_epoch=30"]
LONG += ["precision=float32", "method=[iaa,sgar,namr]", "iaa.start=0", "iaa.update_every=3", "checkpoint_every=4"]
SHORT = [*(a for a in LONG if "epoch" not in a), "epochs=5", "steps_per_epoch=60", "optimizer.lr=1e-4"]


@pytest.fixture(scope="module", autouse=True)
def to_server(mlflow_server, tmp_path_factory: pytest.TempPathFactory):
    before, cache = dict(os.environ), tmp_path_factory.mktemp("cache")
    os.environ.update(MLFLOW_TRACKING_URI=mlflow_server.uri, DML_CACHE=str(cache))
    yield
    os.environ.clear()
    os.environ.update(before)


def undisturbed(arguments: list[str], folder: Path) -> TrainOutcome:
    return run_training(
        load_recipe(arguments[0], [*arguments[1:], "workers=1", f"storage={folder}", "name=calm"]), QUIET, True
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_losses_change_nothing(tmp_path: Path, mlflow_server) -> None:
    count, rng = int(os.environ.get("CHAOS_KILLS", "20")), random.Random(int(os.environ.get("CHAOS_SEED", "0")))
    arguments = LONG
    expected = undisturbed(arguments, tmp_path / "calm")
    started, seen = time.monotonic(), set[int]()
    with machines(3, cpus=2) as cluster:
        asked = [*arguments, "workers=2", "max_failures=100", "name=chaos"]
        training = Training(tmp_path, cluster.address, asked)
        for number in range(count):
            before = newest(tmp_path / "runs" / "chaos")
            training.wait_for(lambda before=before: newest(tmp_path / "runs" / "chaos") != before)
            time.sleep(rng.uniform(0, 3))
            kind = rng.choice(["worker", "node", "driver"])
            print(f"{time.monotonic() - started:6.1f} s  loss {number + 1}: {kind}, at {before}", flush=True)
            seen |= {process.pid for process in cluster.processes()}
            training = lose(kind, cluster, training, rng)
        training.read_job(600)
        print(f"{time.monotonic() - started:6.1f} s  ended", flush=True)
        outcome = json.loads(training.out.read_text().splitlines()[-1])
    assert_as_undisturbed(mlflow_server.uri, outcome, expected)
    nothing_left(seen)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["node", "replaced", "elastic", "notice", "hang", "torn"])
def test_faults_on_three_machines(kind: str, tmp_path: Path, together: Path, mlflow_server) -> None:
    """Three workers on three machines of one CPU each; of two where a machine is lost and not replaced."""
    # Steps are told apart from epochs by their checkpoints: with a notice there is one in the middle of an epoch.
    arguments = [a for a in SHORT if "checkpoint_every" not in a] if kind == "notice" else SHORT
    calm = "calm by epochs" if kind == "notice" else "calm"
    expected = make_once(together, calm, lambda: undisturbed(arguments, together / calm))
    run = tmp_path / "runs" / "faults"
    with machines(3, cpus=2 if kind == "node" else 1) as cluster:
        workers = "1:3" if kind == "elastic" else "3"
        asked = [*arguments, f"workers={workers}", "max_failures=5", "timeout=20", "name=faults"]
        training = Training(tmp_path, cluster.address, asked)
        training.wait_for(lambda: newest(run))
        started, at, before = time.monotonic(), newest(run), cluster.all_workers()
        if kind == "hang":
            cluster.workers(cluster.nodes[1])[0].suspend()
        elif kind == "notice":
            leaving = cluster.nodes[-1]
            cluster.announce(leaving, 10)
            training.wait_for(lambda: "step" in newest(run))
            print(f"notice: a checkpoint after {time.monotonic() - started:.1f} s", flush=True)
            cluster.add()
            time.sleep(5)
            assert training.process.poll() is None
            started, at = time.monotonic(), newest(run)
            cluster.lose(leaving)
        elif kind == "torn":
            training.kill()
            weights = run / newest(run) / "learner.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1] + b"x")
            at = max(path.parent.name for path in run.glob("epoch_*/manifest.json") if is_whole(path.parent))
            training = training.again()
        else:
            # Of two CPUs each, two machines may have all workers.
            cluster.lose([node for node in cluster.nodes if cluster.workers(node)][-1])
            if kind == "replaced":
                time.sleep(5)
                cluster.add()
        training.wait_for(lambda: cluster.all_workers() and not before & cluster.all_workers())
        print(f"{kind}: {time.monotonic() - started:.1f} s from the loss to new workers", flush=True)
        training.wait_for(lambda: newest(run) > at)
        print(f"{kind}: {time.monotonic() - started:.1f} s from the loss to their first checkpoint", flush=True)
        if kind == "elastic":
            assert len(cluster.all_workers()) == 2
        training.read_job(600)
        outcome = json.loads(training.out.read_text().splitlines()[-1])
    assert_as_undisturbed(mlflow_server.uri, outcome, expected)
    assert is_whole(Path(outcome["checkpoint"]))
