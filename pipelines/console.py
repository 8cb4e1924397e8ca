"""Where messages go, what is said while one waits, the progress bar, and the exception of a run that failed."""

import io
import logging
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

QUIET_SECONDS = 0.5  # what takes less needs no words in a log file

# A notebook's stream says that it is a terminal, and cannot take a line back: it gets plain lines, as a file does.
_in_notebook = type(sys.stderr).__module__.startswith("ipykernel")
messages = Console(stderr=True, force_jupyter=False, force_terminal=False if _in_notebook else None)

QUIET = Console(file=io.StringIO())  # for runs whose messages nobody is to see


class RunFailed(Exception):
    """Workers failed on the way; the message is one line.

    Attributes:
        goes_on: Whether the same command can go on: what failed were machines, and not the run itself.
        is_bug: Whether nobody has foreseen it: its cause has a traceback that should be read.
    """

    def __init__(self, message: str, goes_on: bool = False, is_bug: bool = False):
        super().__init__(message)
        self.goes_on, self.is_bug = goes_on, is_bug


def print_notes(console: Console, notes: Iterable[str]) -> None:
    """Say what a user should know of a set or a model, a line each, also in the log."""
    for note in notes:
        logging.getLogger(__name__).info("%s", note)
        console.print(note, style="yellow", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def stage(console: Console, text: str) -> Iterator[None]:
    """Say what is being done for the time of the block.

    On a terminal it is a line that vanishes; in a log file one that stays, of what takes half a second and more.

    Args:
        console: Where it is said.
        text: What is being done, such as "starting Ray".
    """
    if console.is_terminal:
        with console.status(text):
            yield
        return
    timer = threading.Timer(QUIET_SECONDS, lambda: console.print(text, highlight=False, markup=False))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def progress_bar(console: Console, clock: ProgressColumn | None = None) -> Progress:
    """Return a bar that vanishes at its end; its tasks have a description, a total and a field `facts`.

    Args:
        console: Where the bar is drawn.
        clock: The last column; None: the time that remains.
    """
    return Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        clock or TimeRemainingColumn(),
        console=console,
        transient=True,
        refresh_per_second=4,
    )
