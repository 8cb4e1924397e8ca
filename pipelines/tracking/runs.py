"""Runs of MLflow: start, end, read them, and keep texts and figures with them.

Only the driver speaks to the server: it makes the run before training, sends the records that rank 0 hands it from a
thread of their own (sender.py), so that a slow or lost server never holds up a step, and ends the run. The history is
part of every checkpoint: what a server has not received by the end is sent by the next `dml train name=X`, and nothing
twice.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.tracking import server
from pipelines.tracking.address import without_password
from pipelines.tracking.moved_files import is_there, local_folder
from pipelines.tracking.refusals import refused_in_one_line
from pipelines.tracking.server import experiment_id, import_mlflow, require_active

if TYPE_CHECKING:
    import mlflow

# MLflow's limits for one log_batch.
PARAMS_PER_CALL = 100
METRICS_PER_CALL = 1000


def start_run(
    uri: str,
    experiment: str,
    name: str,
    params: Mapping[str, Any],
    tags: dict[str, str],
    data: str,
    digest: str,
    source: str,
    texts: Mapping[str, str] = MappingProxyType({}),
    key: str = "",
) -> str:
    """Start a run of an experiment, or complete the start of one that was cut off.

    Args:
        uri: MLflow's store.
        experiment: Its name.
        name: Of the run.
        params: To log, by name.
        tags: Of the run.
        data: Name of the data set.
        digest: Of the data set.
        source: Where the data set is.
        texts: Artifacts, by file name.
        key: Unique to the run, and kept by the caller from before the first call: a run that has it is taken.

    Returns:
        The run's id.

    Raises:
        ValueError: The store refuses.
    """
    from mlflow.entities import Dataset, DatasetInput, Param

    client = server.connect(uri)
    with refused_in_one_line(uri):
        within = experiment_id(client, uri, experiment)
        if key and (begun := client.search_runs([within], f"tags.start_key = '{key}'")):
            run = begun[0]
            client.update_run(run.info.run_id, status="RUNNING")
        else:
            run = client.create_run(within, run_name=name, tags={**tags, "start_key": key} if key else tags)
        logged = [Param(key, str(value)[:6000]) for key, value in params.items()]
        for start in range(0, len(logged), PARAMS_PER_CALL):
            client.log_batch(run.info.run_id, params=logged[start : start + PARAMS_PER_CALL])
        dataset = Dataset(data, digest, "local", source, profile="{}")
        client.log_inputs(run.info.run_id, [DatasetInput(dataset)])
        for file, text in texts.items():
            client.log_text(run.info.run_id, text, file)
        return run.info.run_id


def resume_run(uri: str, run_id: str, tags: dict[str, str]) -> None:
    """Set a run to RUNNING again, with tags on top of its own. ValueError: the store refuses."""
    from mlflow.entities import RunTag

    client = server.connect(uri)
    with refused_in_one_line(uri):
        client.update_run(run_id, status="RUNNING")
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def end_run(uri: str, run_id: str, status: str) -> None:
    """End a run as FINISHED, FAILED or KILLED. A server that is gone by now is no failure of the run."""
    try:
        server.connect(uri).set_terminated(run_id, status)
    except Exception:
        logging.getLogger(__name__).exception("MLflow was not told that run %s is %s", run_id, status)


def log_text(uri: str, run_id: str, text: str, name: str) -> None:
    """Keep a text as an artifact of the run."""
    server.connect(uri).log_text(run_id, text, name)


def log_figure(uri: str, run_id: str, figure: Any, name: str) -> None:
    """Keep a figure of matplotlib's as an artifact of the run."""
    # Cut to what is drawn, whatever sticks out: matplotlib's layouts fail on some of Optuna's figures.
    server.connect(uri).log_figure(run_id, figure, name, save_kwargs={"bbox_inches": "tight"})


def log_metrics(uri: str, run_id: str, metrics: dict[str, float]) -> None:
    """Log metrics at step 0."""
    now = int(time.time() * 1000)
    send_points(uri, run_id, [MetricPoint(key, value, now, 0) for key, value in metrics.items()])


class MetricPoint(NamedTuple):
    """A value of a metric. time: in milliseconds since 1970."""

    key: str
    value: float
    time: int
    step: int


def send_points(uri: str, run_id: str, points: Sequence[MetricPoint]) -> None:
    """Log values of metrics."""
    from mlflow.entities import Metric

    client = server.connect(uri)
    for start in range(0, len(points), METRICS_PER_CALL):
        client.log_batch(run_id, metrics=[Metric(*point) for point in points[start : start + METRICS_PER_CALL]])


def read_last_steps(uri: str, run_id: str) -> dict[str, int]:
    """Return the last step that the store has of each metric of a run."""
    client = server.connect(uri)
    keys = client.get_run(run_id).data.metrics
    return {key: max(m.step for m in client.get_metric_history(run_id, key)) for key in keys}


class LoggedRun(NamedTuple):
    """A run as MLflow knows it.

    Attributes:
        experiment: The experiment's id.
        group: The same for runs that differ by their seed alone; empty where the run is not for comparison.
        started: In milliseconds since 1970.
        metrics: The last value of each.
    """

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
    """Find the run of a run id, or the run that made models:/NAME@ALIAS; None where MLflow does not know it."""
    mlflow = import_mlflow()
    mlflow.set_tracking_uri(uri)
    with contextlib.suppress(mlflow.MlflowException):
        run_id = mlflow.models.get_model_info(name).run_id if name.startswith("models:/") else name
        return _logged_run(server.connect(uri).get_run(run_id))
    return None


def read_text(uri: str, run_id: str, name: str) -> str:
    """Read a text that is an artifact of a run. ValueError: it is not there."""
    mlflow = import_mlflow()
    mlflow.set_tracking_uri(uri)
    with refused_in_one_line(uri):
        location = server.connect(uri).get_run(run_id).info.artifact_uri
        if not is_there(location):
            raise ValueError(f"run {run_id}: its files are no longer at {local_folder(location)}; put them back")
        return str(mlflow.artifacts.load_text(f"{location}/{name}"))


def read_runs(uri: str, names: Sequence[str]) -> list[LoggedRun]:
    """Read the runs of run ids and experiments, each once. ValueError for a name that is neither."""
    client, runs_by_id = server.connect(uri), dict[str, LoggedRun]()
    mlflow, where = import_mlflow(), f"MLflow at {without_password(uri)}"
    with refused_in_one_line(uri):
        for name in names:
            experiment = client.get_experiment_by_name(name)
            if experiment:
                require_active(experiment, uri, "its runs cannot be compared before")
            try:
                runs = _search_runs(client, experiment.experiment_id) if experiment else [client.get_run(name)]
            except mlflow.MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
                others = ", ".join(other.name for other in client.search_experiments()) or "none"
                raise ValueError(
                    f"{name}: neither a run nor an experiment of {where}; its experiments: {others}"
                ) from None
            for run in runs:
                if "group" in run.data.tags:
                    runs_by_id[run.info.run_id] = _logged_run(run)
    return [*runs_by_id.values()]


def _logged_run(run: mlflow.entities.Run) -> LoggedRun:
    tags, info = run.data.tags, run.info
    identity = info.run_id, info.run_name, info.experiment_id, tags.get("group", ""), tags.get("seed", "0")
    return LoggedRun(*identity, info.status, info.start_time, run.data.params, run.data.metrics, tags)


def _search_runs(client: mlflow.MlflowClient, experiment: str, query: str = "") -> list[mlflow.entities.Run]:
    runs: list[mlflow.entities.Run] = []
    token = None
    while True:
        part = client.search_runs([experiment], query, max_results=1000, page_token=token)
        runs += part
        if not (token := part.token):
            return runs


def running_children(uri: str, parent: str) -> list[LoggedRun]:
    """Read the child runs of a run that MLflow takes for running."""
    client = server.connect(uri)
    experiment = client.get_run(parent).info.experiment_id
    query = f"tags.`mlflow.parentRunId` = '{parent}' and attributes.status = 'RUNNING'"
    return [_logged_run(run) for run in _search_runs(client, experiment, query)]


def log_page(uri: str, experiment: str, name: str, files: dict[str, str]) -> str:
    """Keep texts as artifacts of a run of their own, in the experiment of an id. Return the run's id."""
    client = server.connect(uri)
    run = client.create_run(experiment, run_name=name, tags={"kind": "comparison"})
    for file, text in files.items():
        client.log_text(run.info.run_id, text, file)
    client.set_terminated(run.info.run_id, "FINISHED")
    return run.info.run_id
