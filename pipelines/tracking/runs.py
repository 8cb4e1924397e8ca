"""Runs of MLflow: start, end, read them, and keep texts and figures with them.

The driver makes the run before training and ends it after; between the two only rank 0 speaks to the server, from a
thread of its own, so that a slow or lost server never holds up a step. The history that it sends is part of every
checkpoint: what a server has not received by the end is sent by the next `dml train name=X`, and nothing twice.
"""

import contextlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from pipelines.tracking import server
from pipelines.tracking.server import experiment_id, quiet_mlflow, without_password

PARAMS_PER_CALL = 100


def start_run(
    uri: str, experiment: str, name: str, params: dict[str, Any], tags: dict[str, str], digest: str, source: str
) -> str:
    """A new run of an experiment, with its params, tags and data set. Returns its id."""
    client = server.connect(uri)
    run = client.create_run(experiment_id(client, uri, experiment), run_name=name, tags=tags)
    logged = [Param(key, str(value)[:6000]) for key, value in params.items()]
    for start in range(0, len(logged), PARAMS_PER_CALL):
        client.log_batch(run.info.run_id, params=logged[start : start + PARAMS_PER_CALL])
    dataset = mlflow.entities.Dataset(experiment, digest, "local", source, profile="{}")
    client.log_inputs(run.info.run_id, [mlflow.entities.DatasetInput(dataset)])
    return run.info.run_id


def resume_run(uri: str, run_id: str, tags: dict[str, str]) -> None:
    client = server.connect(uri)
    client.update_run(run_id, status="RUNNING")
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def end_run(uri: str, run_id: str, status: str) -> None:
    """status: FINISHED, FAILED or KILLED. A server that is gone by now is no failure of the run."""
    with contextlib.suppress(Exception), quiet_mlflow():
        server.connect(uri).set_terminated(run_id, status)


def log_text(uri: str, run_id: str, text: str, name: str) -> None:
    """Keep a text as an artifact of the run."""
    server.connect(uri).log_text(run_id, text, name)


def log_figure(uri: str, run_id: str, figure: Any, name: str) -> None:
    """Keep a figure of matplotlib's as an artifact of the run."""
    # Cut to what is drawn, whatever sticks out: matplotlib's layouts fail on some of Optuna's figures.
    server.connect(uri).log_figure(run_id, figure, name, save_kwargs={"bbox_inches": "tight"})


def log_metrics(uri: str, run_id: str, metrics: dict[str, float]) -> None:
    now = int(time.time() * 1000)
    server.connect(uri).log_batch(run_id, metrics=[Metric(key, value, now, 0) for key, value in metrics.items()])


class LoggedRun(NamedTuple):
    """experiment: its id. group: the same for runs that differ by seed alone. started: ms. metrics: the last values."""

    run_id: str
    name: str
    experiment: str
    group: str
    seed: str
    status: str
    started: int
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str] = {}


def find_run(uri: str, name: str) -> LoggedRun | None:
    """Of a run id, or of models:/NAME@ALIAS the run that made it; None where MLflow knows it not."""
    mlflow.set_tracking_uri(uri)
    with contextlib.suppress(MlflowException):
        run_id = mlflow.models.get_model_info(name).run_id if name.startswith("models:/") else name
        return _logged_run(server.connect(uri).get_run(run_id))
    return None


def read_text(uri: str, run_id: str, name: str) -> str:
    """An artifact of the run."""
    mlflow.set_tracking_uri(uri)
    return mlflow.artifacts.load_text(f"runs:/{run_id}/{name}")


def read_runs(uri: str, names: Sequence[str]) -> list[LoggedRun]:
    """The runs of run ids and experiments, each once. ValueError for a name that is neither."""
    client, found = server.connect(uri), dict[str, LoggedRun]()
    for name in names:
        experiment = client.get_experiment_by_name(name)
        try:
            runs = _search_runs(client, experiment.experiment_id) if experiment else [client.get_run(name)]
        except MlflowException:
            raise ValueError(f"{name}: neither a run nor an experiment of MLflow at {without_password(uri)}") from None
        for run in runs:
            if "group" in run.data.tags:
                found[run.info.run_id] = _logged_run(run)
    return [*found.values()]


def _logged_run(run: mlflow.entities.Run) -> LoggedRun:
    tags, info = run.data.tags, run.info
    about = info.run_id, info.run_name, info.experiment_id, tags.get("group", ""), tags.get("seed", "0")
    return LoggedRun(*about, info.status, info.start_time, run.data.params, run.data.metrics, tags)


def _search_runs(client: mlflow.MlflowClient, experiment: str, wanted: str = "") -> list[mlflow.entities.Run]:
    runs, token = list[mlflow.entities.Run](), None
    while True:
        part = client.search_runs([experiment], wanted, max_results=1000, page_token=token)
        runs += part
        if not (token := part.token):
            return runs


def running_children(uri: str, parent: str) -> list[LoggedRun]:
    """Child runs of a run that are said to be running."""
    client = server.connect(uri)
    experiment = client.get_run(parent).info.experiment_id
    wanted = f"tags.`mlflow.parentRunId` = '{parent}' and attributes.status = 'RUNNING'"
    return [_logged_run(run) for run in _search_runs(client, experiment, wanted)]


def log_page(uri: str, experiment: str, name: str, files: dict[str, str]) -> str:
    """A run, in the experiment of this id, that holds texts as artifacts. Returns its id."""
    client = server.connect(uri)
    run = client.create_run(experiment, run_name=name, tags={"kind": "comparison"})
    for file, text in files.items():
        client.log_text(run.info.run_id, text, file)
    client.set_terminated(run.info.run_id, "FINISHED")
    return run.info.run_id
