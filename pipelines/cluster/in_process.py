"""Run a loop in this process, as the only worker: without Ray, and the seconds that processes take to start."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console

from pipelines.cluster.failures import explain_failure
from pipelines.cluster.progress import Follower, LocalBoard
from pipelines.cluster.threads import torch_threads
from pipelines.cluster.worker import Job, Report, Worker, enter
from pipelines.console import messages
from pipelines.tracking.records import EpochRecord


def run_in_process(
    job: Job,
    console: Console = messages,
    keep: Callable[[EpochRecord], object] | None = None,
    report: Report = dict,
) -> Any:
    """Run a job's loop in this process.

    Args:
        job: Names its loop, and is what it is given.
        console: Where progress is shown.
        keep: Called with each epoch's record; None: nobody wants them.
        report: Called with what the loop reports, in Ray Train's place; by default nobody looks.

    Returns:
        What the loop returns.

    Raises:
        RunFailed: The loop failed; the message is the cause.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    board, threads = LocalBoard(), torch.get_num_threads()
    job = replace(job, worker=Worker(cpus=threads, board=board, report=report))
    with torch_threads(threads), Follower(board, console, "starting", keep), _terminated_like_interrupted():
        try:
            return enter(job, None)
        except Exception as error:
            raise explain_failure(error) from error


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Have SIGTERM raise KeyboardInterrupt, as Ctrl-C does; only the main thread can be told so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
