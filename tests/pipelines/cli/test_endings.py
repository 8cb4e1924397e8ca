"""How each kind of error ends a command: what it says, and with which exit code."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import typer

from pipelines.cli.endings import describe_ending, exit_on_error
from pipelines.config.recipe import load_recipe
from pipelines.console import RunFailed
from pipelines.tracking.process import tracking_process
from pipelines.tracking.server import prepare_store


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DML_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def ending_of(function: Callable[[], object], hint: str = "") -> tuple[int, str]:
    with pytest.raises((Exception, KeyboardInterrupt)) as caught:
        function()
    return describe_ending(caught.value, hint)


def raise_(error: BaseException) -> None:
    raise error


def read_far_away() -> None:
    with tracking_process() as tracker:
        tracker.submit(json.loads, "{").result()


@pytest.mark.parametrize(
    "function",
    [
        lambda: json.loads("{"),
        lambda: b"\xe9".decode(),
        lambda: pa.array([1, 2]).cast(pa.date32()),
        lambda: {}["missing"],
        lambda: 1 / 0,
        lambda: int("x"),
        read_far_away,
    ],
)
def test_what_no_code_of_ours_has_put_into_words_is_a_bug_with_a_log(
    function: Callable[[], object], cache: Path
) -> None:
    code, line = ending_of(function)
    assert code == 1 and line.startswith("this is a bug: ") and line.count("\n") == 0
    (log,) = (cache / "logs").iterdir()
    assert f"{log} has the traceback, please report it" in line
    assert "Traceback (most recent call last)" in log.read_text()


def test_our_own_words_are_bad_input_here_and_from_the_process_of_mlflow() -> None:
    code, line = ending_of(lambda: load_recipe("glyphs", ["epocs=1"]))
    assert (code, line) == (2, "bad input: unknown key epocs; did you mean epochs?")

    def far_away() -> None:
        with tracking_process() as tracker:
            tracker.submit(prepare_store, "somewhere").result()

    code, line = ending_of(far_away)
    assert code == 2 and line.startswith("bad input: MLFLOW_TRACKING_URI=somewhere: ")


def test_errors_of_the_system_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path / "none", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "file" / "below", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        assert ending_of(path.read_bytes) == (2, f"bad input: {path}: {reason}")


def test_a_full_disk_says_what_helps_and_how_to_go_on() -> None:
    code, line = ending_of(lambda: Path("/dev/full").write_text("x"), "the same command again continues it")
    assert code == 1 and "No space left on device; free some, or let storage= and DML_CACHE name another disk" in line


def test_failures_and_stops_say_how_to_go_on_where_one_can(cache: Path) -> None:
    assert ending_of(lambda: raise_(RunFailed("a node is lost", goes_on=True)), "go on") == (
        1,
        "failed: a node is lost (go on)",
    )
    assert ending_of(lambda: raise_(RunFailed("diverged")), "go on") == (1, "failed: diverged")
    assert ending_of(lambda: raise_(KeyboardInterrupt()), "go on") == (130, "stopped; go on")
    code, line = ending_of(lambda: raise_(RunFailed("TypeError: x", is_bug=True)), "go on")
    assert code == 1 and re.fullmatch(r"failed: TypeError: x; this is a bug: .*\.log has the traceback, .*", line)


def test_a_log_goes_to_temporary_files_where_the_cache_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DML_CACHE", str(tmp_path / "file"))
    _, line = ending_of(lambda: 1 / 0)
    log = Path(re.search(r"; (.*) has the traceback", line)[1])
    assert "ZeroDivisionError" in log.read_text()
    log.unlink()


def test_what_ends_a_command_by_itself_passes() -> None:
    with pytest.raises(typer.Exit) as caught, exit_on_error():
        raise typer.Exit(3)
    assert caught.value.exit_code == 3


def test_who_has_read_enough_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "pipelines.cli", "config", "glyphs"]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert ended.stderr == ""
