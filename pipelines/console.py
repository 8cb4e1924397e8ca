"""Where messages go, the progress bar, and the exception of a run that failed on its way."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

messages = Console(stderr=True, force_jupyter=False)  # plain lines in a notebook, too: no widgets


class RunFailed(Exception):
    """Workers failed on the way; the message is one line."""


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
    )
