"""What every command has: where messages go, and one clear line with the exit code for each way to fail."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer
from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of standard output.")]
Assignments = Annotated[list[str] | None, typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", show_default=False)]

messages = Console(stderr=True, force_jupyter=False)  # plain lines in a notebook, too: no widgets


class RunFailed(Exception):
    """Workers failed on the way; the message is one line."""


def stop(code: int, message: str) -> NoReturn:
    messages.print(message, style="red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(code)


@contextmanager
def in_words(hint: str = "") -> Iterator[None]:
    """One clear line, and the exit code, for each way to fail."""
    try:
        yield
    except ValueError as error:
        stop(2, f"bad input: {error}")
    except RunFailed as error:
        stop(1, f"failed: {error}{hint and f' ({hint})'}")
    except OSError as error:
        stop(1, f"failed: {error}")
    except KeyboardInterrupt:
        stop(130, f"stopped{hint and f'; {hint}'}")
