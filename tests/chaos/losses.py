"""What is lost on the way, and that it changes nothing."""

import random
from pathlib import Path
from typing import Any

import mlflow

from pipelines.runs.outcome import TrainOutcome
from tests.chaos.machines import Machines, Training


def newest(run: Path) -> str:
    """The name of the newest checkpoint; empty: there is none."""
    return max((path.parent.name for path in run.glob("epoch_*/manifest.json")), default="")


def lose(kind: str, cluster: Machines, training: Training, rng: random.Random) -> Training:
    """A worker's process, a node (another comes in its place), or the driver (the same command is typed again).
    Returns the training that goes on."""
    if kind == "driver":
        training.kill()
        return training.again()
    if kind == "node":
        cluster.lose(rng.choice([node for node in cluster.nodes if cluster.workers(node)] or cluster.nodes))
        cluster.add(cpus=2)
    elif found := [worker for node in cluster.nodes for worker in cluster.workers(node)]:
        rng.choice(found).kill()
    return training


def assert_as_undisturbed(uri: str, outcome: dict[str, Any], expected: TrainOutcome) -> None:
    """Each step once in MLflow, and the same bits of all losses and metrics."""
    client, curves = mlflow.MlflowClient(uri), []
    for run_id in (outcome["run_id"], expected.run_id):
        history = client.get_metric_history(run_id, "train/step_loss")
        curves.append(sorted((metric.step, metric.value) for metric in history))
        assert client.get_run(run_id).info.status == "FINISHED"
    assert [step for step, _ in curves[0]] == [step for step, _ in curves[1]] == list(range(len(curves[1])))
    for one, other in zip(*curves, strict=True):
        assert one == other
    for key, value in expected.metrics.items():
        if "_second" not in key and "data_wait" not in key:
            assert outcome["metrics"][key] == value, key
