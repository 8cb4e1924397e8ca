"""One local Ray and one MLflow server (sqlite behind HTTP) for the whole session, and web servers that fail."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parents[1]
# A shell's `&` and nohup have their children ignore Ctrl-C, and theirs in turn: commands under test would, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class ByRay(LoadScopeScheduling):
    """What shares a Ray, an MLflow and the runs on them goes to one process of `make test`, the rest by files."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        exact = ("cluster", "demo", "export", "inspection", "report", "resume", "search", "train")
        if file.startswith("tests/pipelines/") and Path(file).stem.removeprefix("test_") in exact:
            return "exact"
        return "pipelines" if file.startswith("tests/pipelines/") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByRay:
    return ByRay(config, log)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden numbers and benchmark data, which are not part of the project."""
    return Path(os.environ.get("DML_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where rendered glyphs and features are kept."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def local_ray(cache: Path) -> Iterator[None]:
    os.environ["DML_CACHE"] = str(cache)
    import ray

    from pipelines.cluster.session import start_local

    start_local(4)
    yield
    ray.shutdown()


class Server:
    """An MLflow server that a test may stop and start again."""

    def __init__(self, folder: Path, host: str = "127.0.0.1"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.uri, self.process = folder, f"http://127.0.0.1:{self.port}", None
        self.host = host

    def start(self) -> None:
        where = ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        where += ["--artifacts-destination", str(self.folder / "artifacts")]
        where += ["--host", self.host, "--port", str(self.port), "--workers", "1"]
        lean = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.folder / "server.log", "ab") as log:
            command = [sys.executable, "-m", "mlflow", "server", *where]
            self.process = subprocess.Popen(command, env=lean, stdout=log, stderr=log, start_new_session=True)
        for _ in range(720):  # three minutes, for machines that do much else
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1)
                return
            except OSError:
                time.sleep(0.25)
        self.stop()
        raise RuntimeError((self.folder / "server.log").read_text()[-2000:])

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, 9)
            self.process.wait()
            self.process = None


class Web(SimpleHTTPRequestHandler):
    """A web server over a folder: answers so many requests, then fails so many, and then answers again."""

    answers, failures = 0, 0

    def do_GET(self) -> None:
        kind = type(self)
        if kind.answers:
            kind.answers -= 1
        elif kind.failures:
            kind.failures -= 1
            self.send_error(503)
            return
        super().do_GET()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[Callable[[Path], tuple[str, type[Web]]]]:
    """Function of a folder -> (URL, the handler whose `answers` and `failures` count)."""
    started = []

    def serve(folder: Path) -> tuple[str, type[Web]]:
        handler = type("OfOneTest", (Web,), {})
        started.append(ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))))
        threading.Thread(target=started[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{started[-1].server_port}", handler

    yield serve
    for server in started:
        server.shutdown()


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()
