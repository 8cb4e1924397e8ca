"""Where MLflow runs during a training: in a process of its own, or in this one.

Its import takes as long as that of torch, and in one process the two would wait for each other. Imports no MLflow.
"""

import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any, TypeVar

from pipelines.tracking.server import import_mlflow

Result = TypeVar("Result")


class SameProcess(Executor):
    """Calls functions at once, in the thread that submits them."""

    def submit(self, function: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        future: Future[Result] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:  # raised where the result is asked for, traceback and all
            future.set_exception(error)
        return future


@contextlib.contextmanager
def tracking_process() -> Iterator[Executor]:
    """Start a process that imports MLflow and then calls what is submitted to it, one after the other.

    The main module must be importable, as multiprocessing asks: `dml` is, a script without a main guard is not.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_live_with_parent) as process:
        process.submit(import_mlflow_there)
        yield process


def import_mlflow_there() -> None:
    """Import MLflow; a module cannot be returned to another process."""
    import_mlflow()


def _live_with_parent() -> None:
    """Leave Ctrl-C, and what ends a whole job, to the parent, which has more to say to MLflow; end with it.

    The end is at once: freeing what was imported, object by object, takes a second, for which the parent would wait.
    """
    atexit.register(os._exit, 0)  # the first to be registered is called last
    for number in (signal.SIGINT, signal.SIGTERM):  # which terminals and job schedulers send to all processes of a job
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
