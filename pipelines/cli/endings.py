"""How commands end: results on standard output; each way to fail as one line and an exit code."""

import errno
import json
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.console import RunFailed, messages

OWN_CODE = re.compile(r"[/\\](pipelines|dml_core|tune_spaces)[/\\]")
OWN_MODULE = re.compile(r"(pipelines|dml_core|tune_spaces)\.")
# Of the system's errors those that are no fault of a path that was typed, and what helps.
NO_FAULT_OF_A_PATH = {
    errno.ENOSPC: "; free some, or let storage= and DML_CACHE name another disk",
    errno.EDQUOT: "; free some, or let storage= and DML_CACHE name another disk",
    errno.EIO: "",
    errno.ENOMEM: "",
    errno.EMFILE: "; ulimit -n 65536 allows more",
}


def print_result(as_json: bool, facts: object, *parts: str | Text | Table) -> None:
    """Print what a command has to say.

    Args:
        as_json: Print `facts` as one line of JSON, the last of standard output, and `parts` to standard error.
        facts: What JSON can hold.
        parts: Lines and tables for people. Lines are not wrapped, so that what they name can be copied.
    """
    output = messages if as_json else Console(markup=False, emoji=False)
    for part in parts:
        output.print(part, highlight=False, markup=False, emoji=False, soft_wrap=not isinstance(part, Table))
    if as_json:
        print(json.dumps(facts), flush=True)


def fail(code: int, message: str) -> NoReturn:
    """End the command: one line on standard error, and the exit code."""
    messages.print(message, style="red", highlight=False, markup=False, emoji=False, soft_wrap=True)
    raise typer.Exit(code)


@contextmanager
def exit_on_error(hint: str = "") -> Iterator[None]:
    """End the command with one clear line and the exit code for each way to fail.

    Args:
        hint: How to go on with what was stopped, or failed for no reason of its own.
    """
    try:
        yield
    except typer.Exit:
        raise
    except (Exception, KeyboardInterrupt) as error:
        fail(*describe_ending(error, hint))


def run_script(main: Callable[[], None], hint: str = "") -> NoReturn:
    """Run the main function of a script, which ends as commands do. hint: as of exit_on_error."""
    try:
        with exit_on_error(hint):
            main()
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
    sys.exit(0)


def describe_ending(error: BaseException, hint: str = "") -> tuple[int, str]:
    """Return the exit code and the line with which a command ends by an error.

    What no code of ours has put into words is a bug, and the line names a file with the traceback.

    Args:
        error: What was raised.
        hint: As of exit_on_error.
    """
    go_on = f" ({hint})" if hint else ""
    match error:
        case KeyboardInterrupt():
            return 130, f"stopped{hint and f'; {hint}'}"
        case RunFailed(is_bug=False):
            return 1, f"failed: {error}{go_on if error.goes_on else ''}"
        case RunFailed():
            return 1, f"failed: {error}; this is a bug: {log_traceback(error)} has the traceback, please report it"
        case ValueError() if is_worded_by_us(error):
            return 2, f"bad input: {error}"
        case OSError(errno=None) if is_worded_by_us(error):
            return 1, f"failed: {error}"
        case OSError(errno=number, strerror=reason, filename=name) if number in NO_FAULT_OF_A_PATH:
            return 1, f"failed: {_shown(name)}{reason}{NO_FAULT_OF_A_PATH[number]}{go_on}"
        case OSError(filename=None):
            return 1, f"failed: {_first_line(error)}{go_on}; {log_traceback(error)} has the traceback"
        case OSError(strerror=reason, filename=name):
            return 2, f"bad input: {_shown(name)}{reason}"
    return 1, f"this is a bug: {_first_line(error)}; {log_traceback(error)} has the traceback, please report it"


def is_worded_by_us(error: BaseException) -> bool:
    """Whether a line of our own code raised an error; one of another process has its traceback as a text."""
    if type(error).__module__ != "builtins" and not OWN_MODULE.match(type(error).__module__):
        return False
    if isinstance(error, UnicodeError):
        return False
    if foreign := re.findall(r'^  File "(.*?)"', str(error.__cause__ or ""), re.M):
        return OWN_CODE.search(foreign[-1]) is not None
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and OWN_CODE.search(frames[-1].filename) is not None and "raise" in (frames[-1].line or "")


def log_traceback(error: BaseException) -> Path:
    """Write an error's traceback to a file of its own, in the cache or, failing that, among temporary files."""
    from pipelines.data.sets import cache_folder

    text = " ".join(sys.argv) + "\n" + "".join(traceback.format_exception(error))
    name = f"error-{datetime.now():%Y%m%d-%H%M%S-%f}.log"
    for folder in (cache_folder() / "logs", Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError:
            continue
        return folder / name
    raise error


def _first_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def _shown(name: object) -> str:
    """Return the name of a file, where there is one, and what parts it from the rest of a line."""
    if name is None:
        return ""
    return f"{name.decode(errors='backslashreplace') if isinstance(name, bytes) else name}: "
