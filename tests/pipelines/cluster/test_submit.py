"""`dml submit` against a real `ray start --head` with its job server, and what travels to it."""

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import psutil
import pytest
from typer.testing import CliRunner

from pipelines.cli import main
from pipelines.cluster.working_folder import LARGEST_FILE, travelling_files

PLANTED = "planted-secret-51c7"
SMALL = ["glyphs", "data.limit_classes=8", "batch.classes=3", "batch.images=4", "epochs=1", "steps_per_epoch=2"]


class Head(str):
    """The address of the job server. session: the folder of its Ray."""

    session: Path


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def head(cache: Path) -> Iterator[Head]:
    port, agent = free_port(), free_port()
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="r") as folder:  # Ray's sockets need short paths
        command = ["start", "--head", "--block", "--port=0", "--num-cpus=4", f"--temp-dir={folder}"]
        command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={port}", "--disable-usage-stats"]
        command += [f"--dashboard-agent-listen-port={agent}"]  # what takes jobs: another Ray's may hold its usual port
        # See launch.start_local: processes of this Ray ask no other one on this machine about each other.
        given = {"DML_CACHE": str(cache), "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9", "RAY_AUTH_MODE": "disabled"}
        given["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "1"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with open(Path(folder) / "log", "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", *command],
                env=os.environ | given | {"PATH": path},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        made = Head(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{made}/api/version", timeout=2)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, Path(folder, "log").read_text()
                time.sleep(0.3)
        made.session = next(Path(folder).glob("session_2*"))
        yield made
        everyone = [process, *psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(signal.SIGTERM)
        psutil.wait_procs(everyone[1:], timeout=30)
        process.wait(10)


def dml(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """As typed in a shell, in the working folder."""
    given = os.environ | {"RAY_AUTH_MODE": "disabled"} | environment
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=given, timeout=240)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's working folder: a recipe of their own, and what shall not travel."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("extends: [glyphs]\nseed: 5\n")
    for name in (".env", "deploy.key", "my-credentials.json", ".aws/config", "runs/old/config.yaml", ".venv/x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(PLANTED)
    (tmp_path / "picture.jpg").write_text(PLANTED)
    (tmp_path / "linked.txt").symlink_to("/etc/hostname")
    with open(tmp_path / "large.csv", "wb") as file:
        file.truncate(LARGEST_FILE + 1)
    return tmp_path


def test_what_travels(folder: Path) -> None:
    found = travelling_files(folder)
    assert found.files == [Path("mine.yaml")] and found.large == [Path("large.csv")]
    assert set(map(str, found.secret)) == {".env", "deploy.key", "my-credentials.json", ".aws/config"}
    subprocess.run(["git", "init", "-q"], check=True)
    (folder / ".gitignore").write_text("notes/\n")
    (folder / "notes").mkdir()
    (folder / "notes" / "x.txt").write_text("x")
    (folder / "space.py").write_text("SPACE = {}")
    assert set(map(str, travelling_files(folder).files)) == {"mine.yaml", ".gitignore", "space.py"}


def test_a_folder_of_code_travels_whatever_its_name(folder: Path) -> None:
    for name in ("ours/runs/__init__.py", "ours/runs/train.py", "ours/runs/__pycache__/train.pyc", "old/runs/a/x.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    assert {*map(str, travelling_files(folder).files)} == {"mine.yaml", "ours/runs/__init__.py", "ours/runs/train.py"}


@pytest.mark.slow
@pytest.mark.xdist_group("submit")
def test_a_job_trains_and_no_secret_travels(folder: Path, head: Head, mlflow_server) -> None:
    """The address of the tracking server has a password in it, too, which it does not look at."""
    uri = mlflow_server.uri.replace("http://", f"http://user:{PLANTED}@")
    storage = f"storage={folder / 'shared'}"
    done = dml(
        *("submit", "--address", head, "--wait", "--json", "--env", f"MLFLOW_TRACKING_URI={mlflow_server.uri}"),
        *("--", "train", "mine.yaml", *SMALL[1:], "workers=2", "name=sent", storage, "--json"),
        AWS_SECRET_ACCESS_KEY=PLANTED,
        MLFLOW_TRACKING_URI=uri,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stays here, may hold a secret: .aws/config, .env, deploy.key" in done.stderr
    assert "Retrieval on unseen classes" in done.stdout and "WebSocket" not in done.stderr
    outcome, job = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    assert job["status"] == "SUCCEEDED" and job["code"] == 0
    run = mlflow.MlflowClient(mlflow_server.uri).get_run(outcome["run_id"])
    assert run.info.status == "FINISHED" and run.data.params["seed"] == "5", done.stdout
    assert (folder / "shared" / "sent" / "result.json").is_file()
    for place in (head.session, folder / "shared", mlflow_server.folder):
        assert [path for path in place.rglob("*") if path.is_file() and PLANTED.encode() in path.read_bytes()] == []
    assert PLANTED not in done.stdout + done.stderr

    listed = dml("submit", "list", "--address", head, "--json")
    assert job["job_id"] in {entry["job_id"] for entry in json.loads(listed.stdout)}
    assert outcome["run_id"] in dml("submit", "logs", job["job_id"], "--address", head).stdout


@pytest.mark.slow
@pytest.mark.xdist_group("submit")
def test_a_job_that_fails_and_one_that_is_stopped(folder: Path, head: Head, mlflow_server) -> None:
    given = ["submit", "--address", head, "--env", f"MLFLOW_TRACKING_URI={mlflow_server.uri}"]
    failed = dml(*given, "--wait", "--", "train", "nothing.yaml", "storage=/tmp")
    assert failed.returncode == 2 and "nothing.yaml: no such file" in failed.stdout
    long = dml(*given, "--json", "--", "train", *SMALL[:-2], "epochs=10000", f"storage={folder / 'shared'}")
    job_id = json.loads(long.stdout.splitlines()[-1])["job_id"]
    code, told = interrupted(head, job_id, subprocess.DEVNULL)
    assert code == 130 and f"{job_id} goes on" in told
    answers, terminal = pty.openpty()
    os.write(answers, b"y\n")
    code, told = interrupted(head, job_id, terminal)
    assert code == 130 and f"Stop {job_id}?" in told and "is being stopped" in told
    assert "is being stopped" in dml("submit", "stop", job_id, "--address", head).stderr
    deadline = time.monotonic() + 60
    while dml("submit", "logs", job_id, "--address", head, "--json").stdout.count('"STOPPED"') == 0:
        assert time.monotonic() < deadline


def interrupted(head: Head, job_id: str, stdin: int) -> tuple[int, str]:
    """Exit code and messages of somebody who follows a job and types Ctrl-C."""
    command = [sys.executable, "-m", "pipelines.cli", "submit", "logs", job_id, "--address", head, "--wait"]
    given = os.environ | {"RAY_AUTH_MODE": "disabled"}
    pipe = subprocess.PIPE
    follow = subprocess.Popen(command, env=given, stdin=stdin, stdout=pipe, stderr=pipe, text=True)
    assert follow.stdout is not None
    follow.stdout.readline()
    follow.send_signal(signal.SIGINT)
    _, told = follow.communicate(timeout=60)
    return follow.returncode, told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit", "--", "train"], "--address URL is needed"),
        (["submit", "--address", "127.0.0.1:8265", "--", "train"], "the job server's, such as http://"),
        (["submit", "--address", "http://127.0.0.1:9", "--", "train"], "no job server of Ray's answers"),
        (["submit", "--address", "http://127.0.0.1:9", "--", "rm"], "after -- comes one of train, tune"),
        (["submit", "--address", "http://127.0.0.1:9", "--env", "X", "--", "train"], "--env X: not KEY=VALUE"),
        (["submit", "logs", "--address", "http://127.0.0.1:9"], "takes one job id, not 0"),
    ],
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    found = CliRunner().invoke(main.app, arguments)
    assert found.exit_code == 2 and message in found.stderr and found.stderr.startswith("bad input: "), found.output
    assert found.stderr.count("\n") == 1
