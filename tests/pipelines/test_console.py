"""What is said while one waits, in a log file and on a terminal."""

import io
import time

import pytest
from rich.console import Console

from pipelines import console as console_module
from pipelines.console import stage


def test_a_log_file_gets_a_line_of_what_takes_long_and_none_of_what_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "QUIET_SECONDS", 0.5)
    text = io.StringIO()
    console = Console(file=text)
    with stage(console, "quick"):
        pass
    with stage(console, "reading [64] pictures"):
        deadline = time.monotonic() + 30
        while "reading" not in text.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert text.getvalue() == "reading [64] pictures\n"


def test_on_a_terminal_two_things_at_once_are_said() -> None:
    """Ray starts while the data is read."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=True)
    with stage(console, "starting Ray"), stage(console, "reading the data"):
        time.sleep(0.3)
    assert "starting Ray" in text.getvalue()
