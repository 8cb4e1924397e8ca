"""How commands end: results on standard output; each way to fail as one line and an exit code."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from pipelines.console import RunFailed, messages


def print_result(as_json: bool, made: dict[str, Any], *lines: str | Table) -> None:
    output = messages if as_json else Console()
    for line in lines:
        output.print(line, highlight=False, markup=False, soft_wrap=isinstance(line, str))
    if as_json:
        print(json.dumps(made))


def fail(code: int, message: str) -> NoReturn:
    messages.print(message, style="red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(code)


@contextmanager
def exit_on_error(hint: str = "") -> Iterator[None]:
    """One clear line, and the exit code, for each way to fail."""
    try:
        yield
    except ValueError as error:
        fail(2, f"bad input: {error}")
    except RunFailed as error:
        fail(1, f"failed: {error}{hint and f' ({hint})'}")
    except OSError as error:
        fail(1, f"failed: {error}")
    except KeyboardInterrupt:
        fail(130, f"stopped{hint and f'; {hint}'}")
