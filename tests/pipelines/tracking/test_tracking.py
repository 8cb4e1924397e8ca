"""Against a real MLflow server over HTTP, with sqlite behind it."""

import itertools
from collections.abc import Iterator

import mlflow
import pytest

from pipelines.tracking.models import fetch_checkpoint
from pipelines.tracking.process import SameProcess
from pipelines.tracking.records import EpochRecord
from pipelines.tracking.runs import end_run, start_run
from pipelines.tracking.sender import MetricSender
from pipelines.tracking.server import prepare_store
from tests.server import Server

CLOCK = itertools.count(1)  # two attempts at one epoch have two times, or the server itself would drop the second


def record(epoch: int, steps: int = 3) -> dict:
    first = (epoch - 1) * steps
    losses = [float(first + i) for i in range(steps)]
    return {
        "time": epoch,
        "step": epoch,
        "metrics": {"train/loss": 1.0 / epoch},
        "first_step": first,
        "step_loss": losses,
    }


def logged(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    history = mlflow.MlflowClient(uri).get_metric_history(run_id, key)
    return sorted((m.step, m.value) for m in history)


def open_sender(uri: str, run_id: str, *history: EpochRecord) -> MetricSender:
    sender = MetricSender(SameProcess(), uri, run_id)
    for earlier in history:
        sender.log(earlier)
    return sender


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that nobody else uses: it goes away on the way."""
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def run_id(mlflow_server) -> str:
    prepare_store(mlflow_server.uri)
    return start_run(mlflow_server.uri, "set", "a run", {"a.b": 1}, {"seed": "0"}, "pictures", "digest", "folder")


def test_run_has_params_tags_data_and_steps(mlflow_server, run_id: str) -> None:
    tracker = open_sender(mlflow_server.uri, run_id)
    for epoch in (1, 2):
        tracker.log(record(epoch))
    assert tracker.close() == 0
    end_run(mlflow_server.uri, run_id, "FINISHED")
    run = mlflow.MlflowClient(mlflow_server.uri).get_run(run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "a run"
    assert run.data.params == {"a.b": "1"} and run.data.tags["seed"] == "0"
    assert run.inputs.dataset_inputs[0].dataset.digest == "digest"
    assert run.inputs.dataset_inputs[0].dataset.name == "pictures"
    assert logged(mlflow_server.uri, run_id, "train/loss") == [(1, 1.0), (2, 0.5)]
    assert logged(mlflow_server.uri, run_id, "train/step_loss") == [(i, float(i)) for i in range(6)]


def test_a_start_that_was_cut_off_is_completed(mlflow_server, run_id: str) -> None:
    arguments = (
        mlflow_server.uri,
        "set",
        "cut off",
        {"a.b": 1},
        {"seed": "0"},
        "pictures",
        "digest",
        "folder",
        {"a.txt": "text"},
    )
    client = mlflow.MlflowClient(mlflow_server.uri)
    experiment = client.get_run(run_id).info.experiment_id
    begun = client.create_run(experiment, run_name="cut off", tags={"start_key": "its key"}).info.run_id
    client.set_terminated(begun, "KILLED")
    for _ in range(2):
        assert start_run(*arguments, key="its key") == begun
    run = client.get_run(begun)
    assert run.info.status == "RUNNING" and run.data.params == {"a.b": "1"} and len(run.inputs.dataset_inputs) == 1
    assert [file.path for file in client.list_artifacts(begun)] == ["a.txt"]
    assert start_run(*arguments, key="another") not in (begun, run_id)


def test_more_steps_than_one_call_takes(mlflow_server, run_id: str) -> None:
    tracker = open_sender(mlflow_server.uri, run_id)
    tracker.log(record(1, steps=2500))
    assert tracker.close() == 0
    assert len(logged(mlflow_server.uri, run_id, "train/step_loss")) == 2500


def test_a_resumed_run_logs_nothing_twice_and_loses_nothing(mlflow_server, run_id: str) -> None:
    first = open_sender(mlflow_server.uri, run_id)
    first.log(record(1))
    first.log(record(2))  # logged, but the crash comes before its checkpoint
    assert first.close() == 0
    history = [record(1)]
    again = open_sender(mlflow_server.uri, run_id, *history)
    for epoch in (2, 3):
        again.log(record(epoch))
    assert again.close() == 0
    assert logged(mlflow_server.uri, run_id, "train/loss") == [(e, 1.0 / e) for e in (1, 2, 3)]
    assert logged(mlflow_server.uri, run_id, "train/step_loss") == [(i, float(i)) for i in range(9)]


def test_killed_before_the_first_checkpoint_logs_nothing_twice(mlflow_server, run_id: str) -> None:
    for _ in range(2):
        tracker = open_sender(mlflow_server.uri, run_id)
        tracker.log(record(1))
        assert tracker.close() == 0
    client = mlflow.MlflowClient(mlflow_server.uri)
    assert len(client.get_metric_history(run_id, "train/step_loss")) == 3


def test_a_server_that_goes_away_gets_the_rest_later(mlflow_server, run_id: str) -> None:
    """From a run that has patience; what another never sent is counted, and sent by the next of its name."""
    other = start_run(mlflow_server.uri, "set", "another", {}, {}, "pictures", "digest", "folder")
    tracker = open_sender(mlflow_server.uri, run_id)
    tracker.log(record(1))
    while tracker.unsent:
        pass
    mlflow_server.stop()
    tracker.log(record(2))
    tracker.log(record(3))
    assert tracker.unsent == 2
    hasty = open_sender(mlflow_server.uri, other)
    hasty.log(record(1))
    assert hasty.close(patience=0) == 1
    mlflow_server.start()
    assert tracker.close(patience=60) == 0
    assert logged(mlflow_server.uri, run_id, "train/loss") == [(e, 1.0 / e) for e in (1, 2, 3)]
    assert logged(mlflow_server.uri, other, "train/loss") == []
    assert open_sender(mlflow_server.uri, other, record(1)).close() == 0
    assert logged(mlflow_server.uri, other, "train/loss") == [(1, 1.0)]


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:////dev/null/mlflow.db", "somewhere"])
def test_a_store_that_does_not_answer_is_bad_input(uri: str) -> None:
    with pytest.raises(ValueError, match=uri.removeprefix("sqlite:///")) as found:
        prepare_store(uri)
    assert "\n" not in str(found.value)


def test_unknown_runs_and_models_are_bad_input(mlflow_server, run_id: str) -> None:
    for run in ("0" * 32, "models:/nothing@champion"):
        with pytest.raises(ValueError, match="unknown to MLflow"):
            fetch_checkpoint(mlflow_server.uri, run)
    with pytest.raises(ValueError, match="has no model"):
        fetch_checkpoint(mlflow_server.uri, run_id)
