"""States of MLflow's store that a run cannot use: each is told in one line, with the way on, before anything starts."""

import http.server
import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from pipelines.tracking.models import fetch_checkpoint
from pipelines.tracking.runs import end_run, read_runs, read_text, start_run
from pipelines.tracking.server import connect, prepare_run, prepare_store
from tests.server import Server

NOBODY = 65534


def sqlite_uri(file: Path) -> str:
    return f"sqlite:///{file}"


@pytest.fixture(scope="module")
def made_before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with an experiment and a run, beside the files of that run."""
    folder = tmp_path_factory.mktemp("project")
    uri = sqlite_uri(folder / "mlflow.db")
    prepare_run(uri, "set")
    run_id = start_run(uri, "set", "a run", {}, {"group": "g"}, "set", "digest", "folder", {"kept.txt": "a text"})
    end_run(uri, run_id, "FINISHED")
    return folder


@pytest.fixture
def project(made_before: Path, tmp_path: Path) -> Path:
    """A copy of it, for a test to break."""
    return shutil.copytree(made_before, tmp_path / "copy")


def run_of(project: Path) -> str:
    return connect(sqlite_uri(project / "mlflow.db")).search_runs(["1"])[0].info.run_id


def refusal(uri: str, *run: str) -> str:
    with pytest.raises(ValueError) as raised:
        prepare_run(uri, "set", *run)
    message = str(raised.value)
    assert "\n" not in message and "sqlalche" not in message and "Error" not in message
    return message


def execute(file: Path, statement: str) -> None:
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(statement)


def test_a_start_writes_to_the_store(project: Path) -> None:
    uri = sqlite_uri(project / "mlflow.db")
    before = connect(uri).get_experiment("1").tags["dml.last_start"]
    execute(project / "mlflow.db", "UPDATE experiment_tags SET value = 'long ago' WHERE key = 'dml.last_start'")
    prepare_run(uri, "set")
    assert before <= connect(uri).get_experiment("1").tags["dml.last_start"] != "long ago"


def test_first_starts_in_an_experiment_may_come_together(mlflow_server: Server) -> None:
    """MLflow inserts a tag twice, and refuses one, where two requests find it missing."""
    starts = 8
    with ThreadPoolExecutor(starts) as pool:
        for number in range(10):
            names = [f"together-{number}"] * starts
            assert [*pool.map(prepare_run, [mlflow_server.uri] * starts, names)] == [None] * starts


def prepare_together(meeting: Barrier, uri: str) -> None:
    meeting.wait()
    prepare_run(uri, "set")


def test_first_starts_beside_a_project_may_come_together(tmp_path: Path) -> None:
    processes, uri = get_context("fork"), sqlite_uri(tmp_path / "mlflow.db")
    meeting = processes.Barrier(3)
    starts = [processes.Process(target=prepare_together, args=(meeting, uri)) for _ in range(3)]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert [start.exitcode for start in starts] == [0, 0, 0]
    assert [experiment.name for experiment in connect(uri).search_experiments()] == ["set", "Default"]


def test_files_that_are_no_database(project: Path) -> None:
    file = project / "mlflow.db"
    whole = file.read_bytes()
    for content in (b"notes on shoes, no database\n" * 100, whole[: len(whole) // 2]):
        file.write_bytes(content)
        assert f"MLflow's database {file} is damaged, or no database; put a copy" in refusal(sqlite_uri(file))
    file.unlink()
    file.mkdir()
    assert f"MLflow's database {file} is a folder; remove it" in refusal(sqlite_uri(file))
    (project / "notes").write_text("")
    below = project / "notes" / "mlflow.db"
    assert f"MLflow's database {below} cannot be used" in refusal(sqlite_uri(below))


def test_a_database_of_another_version(project: Path) -> None:
    file = project / "mlflow.db"
    execute(file, "UPDATE alembic_version SET version_num = 'ffffffffffff'")
    message = refusal(sqlite_uri(file))
    assert "another version of MLflow (schema ffffffffffff; " in message
    assert f"`mlflow db upgrade sqlite:///{file}`" in message and "pip install --upgrade mlflow" in message


def test_a_locked_database(project: Path) -> None:
    file = project / "mlflow.db"
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert f"MLflow's database {file} is locked by another program" in refusal(f"sqlite:///{file}?timeout=0.1")


@contextmanager
def without_rights(folder: Path) -> Iterator[None]:
    """Nobody may write below a folder for the time of the block; root, who always may, is somebody else."""
    paths = [folder, *folder.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.geteuid() == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(os.getuid())
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.fixture
def visible(made_before: Path) -> Iterator[Path]:
    """A copy in a folder that every user can reach."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield shutil.copytree(made_before, Path(folder, "copy"))


def test_a_store_that_may_be_read_and_not_written(visible: Path) -> None:
    file = visible / "mlflow.db"
    prepare_store(sqlite_uri(file))
    with without_rights(visible):
        assert f"MLflow's database {file} cannot be written to; make" in refusal(sqlite_uri(file))
        assert [run.name for run in read_runs(sqlite_uri(file), ["set"])] == ["a run"]
    with without_rights(visible / "mlartifacts"):
        os.seteuid(os.getuid())
        for path in (file, visible):
            path.chmod(0o777)
        if os.getuid() == 0:
            os.seteuid(NOBODY)
        message = refusal(sqlite_uri(file))
    assert f"keeps the files of runs in {visible / 'mlartifacts' / 'set'}, which cannot be written to" in message


def test_what_was_deleted_in_mlflows_page(project: Path) -> None:
    uri, run_id = sqlite_uri(project / "mlflow.db"), run_of(project)
    client = connect(uri)
    client.delete_run(run_id)
    message = refusal(uri, run_id, "another name= starts anew")
    assert f"run {run_id} is deleted in MLflow" in message and message.endswith("; another name= starts anew")
    assert f"`MLFLOW_TRACKING_URI={uri} mlflow runs restore --run-id {run_id}` restores it" in message
    client.delete_experiment("1")
    for run in ([], [run_id, "another name= starts anew"]):
        message = refusal(uri, *run)
        assert "experiment set is deleted in MLflow" in message
        assert f"`MLFLOW_TRACKING_URI={uri} mlflow experiments restore --experiment-id 1` restores it" in message
    assert refusal(uri).endswith("; experiment=OTHER takes another")
    with pytest.raises(ValueError, match="experiment set is deleted"):
        read_runs(uri, ["set"])
    with pytest.raises(ValueError, match="experiment set is deleted"):
        start_run(uri, "set", "late", {}, {}, "set", "digest", "folder")


def test_a_database_that_was_removed_knows_a_run_no_more(tmp_path: Path) -> None:
    uri = sqlite_uri(tmp_path / "mlflow.db")
    message = refusal(uri, "0" * 32, "another name= starts anew")
    assert f"run {'0' * 32} is unknown to MLflow at {uri}" in message and message.endswith("another name= starts anew")


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers every request with `status` and `body`."""

    status, body = 200, b""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self.send_response(self.status)
        self.send_header("content-length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, b"<html>a router's page</html>", "what answers there is no MLflow server"),
        (404, b"<html>not here</html>", "what answers there is no MLflow server"),
        (401, b"who are you", "refuses this user (unauthenticated); set MLFLOW_TRACKING_USERNAME"),
        (403, b'{"error_code": "PERMISSION_DENIED", "message": "no"}', "refuses this user (permission denied)"),
        (500, b"<html>oh</html>", "answers with the error 500"),
    ],
)
def test_servers_that_do_not_serve(status: int, body: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    handler = type("These", (Answers,), {"status": status, "body": body})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as peer:
        threading.Thread(target=peer.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{peer.server_port}"
        told = refusal(uri)
        peer.shutdown()
    assert message in told and uri in told and "<" not in told


@pytest.fixture
def with_model(project: Path) -> Path:
    """The project with a registered model, a file of a checkpoint being all that it has."""
    uri, checkpoint = sqlite_uri(project / "mlflow.db"), project / "checkpoint"
    prepare_store(uri)
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text("{}")
    run = start_run(uri, "set", "another", {}, {}, "set", "digest", "folder")
    import mlflow

    mlflow.set_tracking_uri(uri)
    with mlflow.start_run(run_id=run):
        mlflow.pyfunc.log_model(
            name="model", loader_module="json", data_path=str(checkpoint), registered_model_name="shoes"
        )
    connect(uri).set_registered_model_alias("shoes", "best", "1")
    return project


def test_registered_models_and_runs_that_are_not_there(with_model: Path) -> None:
    uri = sqlite_uri(with_model / "mlflow.db")
    for name in ("models:/shoes/1", "models:/shoes@best", "models:/shoes/latest"):
        assert (fetch_checkpoint(uri, name) / "manifest.json").is_file()
    for name, words in {
        "models:/shoe/1": "its registered models: shoes",
        "models:/shoes/7": "of shoes it has models:/shoes/1, models:/shoes@best",
        "models:/shoes@worst": "of shoes it has models:/shoes/1, models:/shoes@best",
        "models:/shoes": "not models:/NAME/VERSION or models:/NAME@ALIAS",
        "0" * 32: f"unknown to MLflow at {uri}",
    }.items():
        with pytest.raises(ValueError) as raised:
            fetch_checkpoint(uri, name)
        assert name in str(raised.value) and words in str(raised.value) and "\n" not in str(raised.value)
    connect(uri).delete_model_version("shoes", "1")
    with pytest.raises(ValueError, match="of shoes it has none"):
        fetch_checkpoint(uri, "models:/shoes/1")


def test_a_project_that_has_moved_takes_its_files_along(with_model: Path, tmp_path: Path) -> None:
    moved = with_model.rename(tmp_path / "moved % here")
    uri = sqlite_uri(moved / "mlflow.db")
    first = connect(uri).search_runs(["1"], "attributes.run_name = 'a run'")[0].info.run_id
    prepare_run(uri, "set")
    assert fetch_checkpoint(uri, "models:/shoes@best").is_relative_to(moved)
    assert read_text(uri, first, "kept.txt") == "a text"
    new = start_run(uri, "set", "new", {}, {}, "set", "digest", "folder", {"new.txt": "new"})
    assert [*moved.rglob(f"{new}/artifacts/new.txt")] and not with_model.exists()


def test_files_that_have_not_come_along(with_model: Path, tmp_path: Path) -> None:
    shutil.rmtree(with_model / "mlartifacts")
    uri = sqlite_uri(with_model / "mlflow.db")
    prepare_store(uri)
    with pytest.raises(ValueError, match=f"models:/shoes/1: its files are no longer at {with_model}/mlartifacts"):
        fetch_checkpoint(uri, "models:/shoes/1")
    with pytest.raises(ValueError, match="its files are no longer at"):
        read_text(uri, run_of(with_model), "kept.txt")
