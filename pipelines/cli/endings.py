"""How commands end: results on standard output; each way to fail as one line and an exit code."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.console import RunFailed, messages


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
    except ValueError as error:
        fail(2, f"bad input: {error}")
    except RunFailed as error:
        fail(1, f"failed: {error}{f' ({hint})' if hint and error.goes_on else ''}")
    except OSError as error:
        fail(1, f"failed: {error}")
    except KeyboardInterrupt:
        fail(130, f"stopped{hint and f'; {hint}'}")
