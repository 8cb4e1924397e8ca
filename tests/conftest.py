"""An MLflow server (sqlite behind HTTP) for all processes of a session, a local Ray for each of those that need one,
and web servers that fail."""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import hypothesis
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests import ranks, sharing
from tests.server import Server

ROOT = Path(__file__).parents[1]
hypothesis.settings.register_profile("no deadline", deadline=None)  # other tests run beside each example
hypothesis.settings.load_profile("no deadline")
# A shell's `&` and nohup have their children ignore Ctrl-C, and theirs in turn: commands under test would, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# The same tests on every machine: without its GPUs, in this process and in all that it starts. Where Ray shall count
# invented GPUs it starts without this variable, in a process of its own. `pytest tests/cuda` alone sees the GPUs.
if any("tests/cuda" in argument for argument in sys.argv):
    os.environ["TESTS_OF_CUDA"] = "1"  # for processes of xdist, which have no arguments
if "TESTS_OF_CUDA" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    collect_ignore = ["cuda"]
# Ray's workers do not give way to everything else on this machine, and Ray does not look at memory all the time.
os.environ.update(RAY_worker_niceness="0", RAY_memory_monitor_refresh_ms="0", RAY_event_stats="0")
# Processes share the cores, so that threads of one would wait for each other.
for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

# What shares something that takes long to start: files of a group run one after the other, in one process.
GROUPS = {
    "ray": ["data/test_remote", "runs/test_train"],
    "more of ray": ["cluster/test_ray_private", "data/test_streaming", "cli/test_cli"],
    "ranks": [module.replace(".", "/") for module in ranks.USERS],
}
# The rest by files, of which these take longest.
LONG = ["tune", "report", "pages", "search", "demo", "quickstart", "python", "every_key", "export"]


def group_of(nodeid: str) -> str:
    file = nodeid.partition("::")[0]
    ours = (name for name, files in GROUPS.items() if any(file.endswith(f"/{path}.py") for path in files))
    return next(ours, file)


class ByGroup(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByGroup | None:
    return ByGroup(config, log) if config.getvalue("dist") == "loadscope" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first."""
    long = [*GROUPS, *LONG]
    places = {name: place for place, name in enumerate(long)}

    def place(item: pytest.Item) -> int:
        group = group_of(item.nodeid)
        return places.get(group, places.get(Path(group).stem.removeprefix("test_"), len(long)))

    items.sort(key=place)


@pytest.fixture(scope="session")
def together(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder that all processes of this session share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "together"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden numbers and benchmark data, which are not part of the project."""
    return Path(os.environ.get("DML_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def cache(together: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where features and the glyphs, which are rendered once for all processes, are kept: DML_CACHE from here on."""
    from dml_core.data import glyphs

    folder = tmp_path_factory.mktemp("cache")
    os.environ["DML_CACHE"] = str(folder)
    sharing.make_once(together, "glyphs", lambda: glyphs.load(together / "cache") is None)
    shutil.copytree(together / "cache", folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def local_ray(cache: Path) -> None:
    """A Ray of this process, which the next module finds if it needs one, too."""
    import ray

    from pipelines.cluster.session import start_local

    if not ray.is_initialized():
        start_local(4)


@pytest.fixture(scope="module")
def without_ray(cache: Path) -> None:
    """As when a user types a command: what can do without Ray does."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


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
def mlflow_server(together: Path) -> Iterator[Server]:
    folder, pid = together / "mlflow", os.getpid()
    folder.mkdir(exist_ok=True)
    server = sharing.join(together, "server", pid, lambda: Server(folder).start())
    yield server
    sharing.leave(together, "server", pid, server.stop)
