"""RAY_ADDRESS and --address where no Ray is: known in seconds, in one line with the way on."""

import http.server
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from typer.testing import CliRunner

from pipelines.cli import main
from pipelines.cluster import address
from pipelines.cluster.address import cluster_address, require_cluster
from pipelines.cluster.devices import has_cluster
from pipelines.cluster.session import open_cluster
from pipelines.config.recipe import to_yaml
from pipelines.config.schema import Config


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """An address where something listens and says nothing."""
    with socket.socket() as listens:
        listens.bind(("127.0.0.1", 0))
        listens.listen()
        yield f"127.0.0.1:{listens.getsockname()[1]}"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """An address where a web server listens."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def refusal(monkeypatch: pytest.MonkeyPatch, given: str) -> str:
    monkeypatch.setenv("RAY_ADDRESS", given)
    monkeypatch.setattr(address, "PATIENCE_S", 0.5)
    begun = time.monotonic()
    with pytest.raises(ValueError, match=rf"^RAY_ADDRESS={re.escape(given)}: ") as refused:
        require_cluster()
    assert time.monotonic() - begun < 20 and "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_is_gone_is_known_at_once(scheme: str, nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(monkeypatch, scheme + nobody)
    assert "no Ray cluster answers (Connection refused)" in message
    assert message.endswith("or unset RAY_ADDRESS to train on this machine")


def test_what_listens_but_is_no_ray(web: str, silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "what listens there is no Ray" in refusal(monkeypatch, web)
    assert "timed out" in refusal(monkeypatch, silent)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("http://10.0.0.1:8265", "a job server's address; HOST:PORT .* 10.0.0.1:6379; `dml submit --address http://10"),
        ("here", "not HOST:PORT"),
        ("here:there", "not HOST:PORT"),
        ("nowhere.invalid:6379", "no Ray cluster answers"),
    ],
)
def test_addresses_of_other_forms(given: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.search(message, refusal(monkeypatch, given))


@pytest.mark.parametrize("given", ["", "local"])
def test_no_cluster_is_asked_for(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", given)
    require_cluster()
    assert cluster_address() is None and has_cluster() == ray.is_initialized()


def test_a_ray_that_runs_is_found(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    require_cluster()
    with open_cluster(Config(), None):
        assert ray.is_initialized()


@pytest.mark.parametrize("command", ["train glyphs", "tune glyphs --space base", "evaluate RUN"])
def test_commands_say_so_first(
    command: str, nobody: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracked_here: None
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", nobody)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "manifest.json").write_text("{}")
    (tmp_path / "RUN" / "config.yaml").write_text(to_yaml(Config()))
    found = CliRunner().invoke(main.app, command.split())
    assert found.exit_code == 2 and found.stderr.count("\n") == 1, found.output
    assert found.stderr.startswith(f"bad input: RAY_ADDRESS={nobody}: no Ray cluster answers")
    assert [path.name for path in tmp_path.iterdir()] == ["RUN"]


def test_job_servers_that_are_none(nobody: str, web: str, silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.cluster.submit.PATIENCE_S", 0.5)
    for given, reason in ((nobody, "Connection refused"), (web, "no job server"), (silent, "timed out")):
        found = CliRunner().invoke(main.app, ["submit", "--address", f"http://{given}", "list"])
        assert found.exit_code == 2 and found.stderr.count("\n") == 1, found.output
        assert f"--address http://{given}: no job server of Ray's answers" in found.stderr and reason in found.stderr
        assert "ray dashboard cluster.yaml" in found.stderr
