"""The only file that knows MLflow.

The driver makes the run before training and ends it after; between the two only rank 0 speaks to the server, from a
thread of its own, so that a slow or lost server never holds up a step. The history that it sends is part of every
checkpoint: what a server has not received by the end is sent by the next `dml train name=X`, and nothing twice.
"""

import contextlib
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the default waits for minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # five processes for language models, in `dml ui`
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

logging.getLogger("alembic").setLevel(logging.WARNING)
logging.getLogger("mlflow").setLevel(logging.ERROR)

METRICS_A_CALL = 1000  # MLflow's limit for one log_batch
PARAMS_A_CALL = 100
bad_request = MlflowException.invalid_parameter_value  # (message): MLflow's server answers 400 with it


def default_uri(folder: Path) -> str:
    """MLFLOW_TRACKING_URI, or a sqlite file in the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / 'mlflow.db'}"


def shown(uri: str) -> str:
    """Without the password that it may hold."""
    return re.sub(r"://[^/@]*@", "://***@", uri)


def prepare(uri: str) -> None:
    """Make the database, or reach the server. ValueError within seconds if it does not answer.

    Done once, before any worker: several writers that meet on a fresh sqlite file break it.
    """
    if not uri.startswith(("sqlite:", "http://", "https://", "postgresql", "mysql", "databricks")):
        raise ValueError(f"MLFLOW_TRACKING_URI={shown(uri)}: not an http(s) server or a database (sqlite:///FILE)")
    try:
        with _brief():
            _client(uri).search_experiments(max_results=1)
    except Exception as error:
        reason = shown(str(error).splitlines()[0][:200])
        told = f"MLflow at {shown(uri)} does not answer ({reason})"
        raise ValueError(f"{told}; set MLFLOW_TRACKING_URI or start it") from None


def start_run(
    uri: str, experiment: str, name: str, params: dict[str, Any], tags: dict[str, str], digest: str, source: str
) -> str:
    """A new run of an experiment, with its params, tags and data set. Returns its id."""
    client = _client(uri)
    run = client.create_run(_experiment(client, uri, experiment), run_name=name, tags=tags)
    logged = [Param(key, str(value)[:6000]) for key, value in params.items()]
    for start in range(0, len(logged), PARAMS_A_CALL):
        client.log_batch(run.info.run_id, params=logged[start : start + PARAMS_A_CALL])
    dataset = mlflow.entities.Dataset(experiment, digest, "local", source, profile="{}")
    client.log_inputs(run.info.run_id, [mlflow.entities.DatasetInput(dataset)])
    return run.info.run_id


def resume_run(uri: str, run_id: str, tags: dict[str, str]) -> None:
    client = _client(uri)
    client.update_run(run_id, status="RUNNING")
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def end_run(uri: str, run_id: str, status: str) -> None:
    """status: FINISHED, FAILED or KILLED. A server that is gone by now is no failure of the run."""
    with contextlib.suppress(Exception), _brief():
        _client(uri).set_terminated(run_id, status)


def log_text(uri: str, run_id: str, text: str, name: str) -> None:
    """Keep a text as an artifact of the run."""
    _client(uri).log_text(run_id, text, name)


def log_figure(uri: str, run_id: str, figure: Any, name: str) -> None:
    """Keep a figure of matplotlib's as an artifact of the run."""
    # Cut to what is drawn, whatever sticks out: matplotlib's layouts fail on some of Optuna's figures.
    _client(uri).log_figure(run_id, figure, name, save_kwargs={"bbox_inches": "tight"})


def log_metrics(uri: str, run_id: str, metrics: dict[str, float]) -> None:
    now = int(time.time() * 1000)
    _client(uri).log_batch(run_id, metrics=[Metric(key, value, now, 0) for key, value in metrics.items()])


def set_alias(uri: str, model: str, alias: str) -> None:
    """model: NAME/VERSION."""
    name, _, version = model.rpartition("/")
    _client(uri).set_registered_model_alias(name, alias, version)


def log_model(uri: str, run_id: str, checkpoint: Path, model_name: str, example: bytes, dim: int, version: str) -> str:
    """Log the checkpoint as a pyfunc model, encoded pictures -> embeddings, and register it. Returns NAME/VERSION.

    The model is the folder itself and pipelines.embedder reads it: nothing is pickled.
    """
    import numpy as np
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    mlflow.set_tracking_uri(uri)
    output = TensorSpec(np.dtype("float32"), (-1, dim))
    signature = ModelSignature(Schema([ColSpec("binary", "image")]), Schema([output]))
    with _brief(), mlflow.start_run(run_id=run_id):
        info = mlflow.pyfunc.log_model(
            name="model",
            loader_module="pipelines.embedder",
            data_path=str(checkpoint),
            signature=signature,
            input_example=pd.DataFrame({"image": [example]}),
            pip_requirements=[f"dml-ray=={version}"],
            registered_model_name=model_name,
        )
    return f"{model_name}/{info.registered_model_version}"


def find_checkpoint(uri: str, run: str) -> Path:
    """The checkpoint folder of a run id or models:/NAME@ALIAS, fetched from MLflow. ValueError if there is none."""
    mlflow.set_tracking_uri(uri)
    try:
        if run.startswith("models:/"):
            model = run
        else:
            outputs = _client(uri).get_run(run).outputs
            if not outputs or not outputs.model_outputs:
                raise ValueError(f"run {run} has no model: it did not finish")
            model = f"models:/{outputs.model_outputs[-1].model_id}"
        local = Path(mlflow.artifacts.download_artifacts(model))
    except MlflowException as error:
        told = f"not a checkpoint folder, and unknown to MLflow at {shown(uri)}"
        raise ValueError(f"{run}: {told} ({error.message})") from None
    return next(path.parent for path in local.rglob("manifest.json"))


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
        return _logged(_client(uri).get_run(run_id))
    return None


def read_text(uri: str, run_id: str, name: str) -> str:
    """An artifact of the run."""
    mlflow.set_tracking_uri(uri)
    return mlflow.artifacts.load_text(f"runs:/{run_id}/{name}")


def read_runs(uri: str, names: Sequence[str]) -> list[LoggedRun]:
    """The runs of run ids and experiments, each once. ValueError for a name that is neither."""
    client, found = _client(uri), dict[str, LoggedRun]()
    for name in names:
        experiment = client.get_experiment_by_name(name)
        try:
            runs = _all_runs(client, experiment.experiment_id) if experiment else [client.get_run(name)]
        except MlflowException:
            raise ValueError(f"{name}: neither a run nor an experiment of MLflow at {shown(uri)}") from None
        for run in runs:
            if "group" in run.data.tags:
                found[run.info.run_id] = _logged(run)
    return [*found.values()]


def _logged(run: mlflow.entities.Run) -> LoggedRun:
    tags, info = run.data.tags, run.info
    about = info.run_id, info.run_name, info.experiment_id, tags.get("group", ""), tags.get("seed", "0")
    return LoggedRun(*about, info.status, info.start_time, run.data.params, run.data.metrics, tags)


def _all_runs(client: mlflow.MlflowClient, experiment: str, wanted: str = "") -> list[mlflow.entities.Run]:
    runs, token = list[mlflow.entities.Run](), None
    while True:
        part = client.search_runs([experiment], wanted, max_results=1000, page_token=token)
        runs += part
        if not (token := part.token):
            return runs


def running(uri: str, parent: str) -> list[LoggedRun]:
    """Child runs of a run that are said to be running."""
    client = _client(uri)
    experiment = client.get_run(parent).info.experiment_id
    wanted = f"tags.`mlflow.parentRunId` = '{parent}' and attributes.status = 'RUNNING'"
    return [_logged(run) for run in _all_runs(client, experiment, wanted)]


def keep_page(uri: str, experiment: str, name: str, files: dict[str, str]) -> str:
    """A run, in the experiment of this id, that holds texts as artifacts. Returns its id."""
    client = _client(uri)
    run = client.create_run(experiment, run_name=name, tags={"kind": "comparison"})
    for file, text in files.items():
        client.log_text(run.info.run_id, text, file)
    client.set_terminated(run.info.run_id, "FINISHED")
    return run.info.run_id


class Tracker:
    """Sends a run's history from a thread, in order; keeps what could not be sent and tries again.

    A record is {"time": ms, "step": epoch, "metrics": {name: value}} and may have "first_step" and "step_loss": [...],
    the loss of each optimizer step. What MLflow has already, from before a crash, is not sent again.
    """

    def __init__(self, uri: str, run_id: str, history: list[dict[str, Any]]):
        self.client, self.run_id = _client(uri), run_id
        self.seen: dict[str, int] = {}
        self.pending: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.unsent, self.patience = 0, float("inf")
        self.thread = threading.Thread(target=self._send_all, daemon=True)
        self.thread.start()
        for record in history:
            self.log(record)

    def log(self, record: dict[str, Any]) -> None:
        self.unsent += 1
        self.pending.put(record)

    def close(self, patience: float = 30.0) -> int:
        """Send what is left, for `patience` seconds at most. Returns the number of records that were not sent."""
        self.patience = time.monotonic() + patience
        self.pending.put(None)
        self.thread.join(patience + 30)
        return self.unsent

    def _send_all(self) -> None:
        known = False  # a run that was killed before its first checkpoint has steps there too
        while (record := self.pending.get()) is not None:
            wait = 1.0
            while True:
                try:
                    if not known:
                        self.seen, known = self._last_steps(), True
                    self._send(record)
                    self.unsent -= 1
                    break
                except Exception as error:
                    logging.getLogger(__name__).warning("MLflow did not take epoch %s: %s", record["step"], error)
                    known = False  # part of it may have arrived
                    if time.monotonic() + wait > self.patience:
                        return
                    time.sleep(wait)
                    wait = min(2 * wait, 30.0)

    def _send(self, record: dict[str, Any]) -> None:
        now = record["time"]
        losses = enumerate(record.get("step_loss", []), record.get("first_step", 0))
        metrics = [Metric("train/step_loss", value, now, step) for step, value in losses]
        metrics += [Metric(key, value, now, record["step"]) for key, value in record["metrics"].items()]
        new = [m for m in metrics if m.step > self.seen.get(m.key, -1)]
        for start in range(0, len(new), METRICS_A_CALL):
            self.client.log_batch(self.run_id, metrics=new[start : start + METRICS_A_CALL])

    def _last_steps(self) -> dict[str, int]:
        keys = self.client.get_run(self.run_id).data.metrics
        return {key: max(m.step for m in self.client.get_metric_history(self.run_id, key)) for key in keys}


def _client(uri: str) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(uri)


def _experiment(client: mlflow.MlflowClient, uri: str, name: str) -> str:
    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    # Beside a database in a file, artifacts go to a folder next to it; a server has its own place for them.
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts" / name).as_uri()
    try:
        # The kind chooses which of its two faces MLflow's page shows: training, not chat.
        return client.create_experiment(name, location, {"mlflow.experimentKind": "custom_model_development"})
    except MlflowException:  # another run made it meanwhile
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return found.experiment_id


@contextlib.contextmanager
def _brief() -> Iterator[None]:
    """MLflow's own chatter on standard error, off: our commands print their own."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        yield
