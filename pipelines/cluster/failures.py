"""Explain in one line why workers failed; call a function so that Ctrl-C reaches us."""

import re
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import NamedTuple, TypeVar

from pipelines.cluster.ray_private import means_storage_not_shared
from pipelines.console import RunFailed

Result = TypeVar("Result")
LOST_PEER = "Connection closed by peer"  # what gloo says in the workers that wait for one that failed


class Remedy(NamedTuple):
    """What to do about a failure.

    Attributes:
        pattern: Of the first cause; the first remedy that fits counts.
        advice: What to do; "" where the cause says it.
        goes_on: Whether the same command goes on, perhaps after what is advised.
    """

    pattern: str
    advice: str
    goes_on: bool


# Of failures that are known by their text, whose errors are made by torch, Ray, gloo, NCCL and systems.
REMEDIES = (
    Remedy("the loss is not finite", "", False),
    Remedy("embeddings are not finite", "the training has diverged: try a lower optimizer.lr, by another name", False),
    Remedy(
        "CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED",
        "the GPU is full: by another name, take more batch.slices, precision=bf16 or a smaller data.image_size",
        False,
    ),
    Remedy("unreadable picture", "data.on_bad_image=skip leaves such out, by another name", False),
    Remedy("a node does not see the run's folder", "take storage=s3://BUCKET/runs or a folder on all nodes", False),
    Remedy("attempts failed", "", True),  # of a read over the network
    Remedy("No space left on device|Disk quota exceeded", "make room", True),
    Remedy("Too many open files", "raise the limit by ulimit -n, or take fewer data.loader_processes", True),
    Remedy(
        r"DataLoader worker .*(killed|exited)|Bus error|shared memory",
        "memory is full: take fewer data.loader_processes or fewer workers; results stay the same",
        True,
    ),
    Remedy(
        "MemoryError|[Cc]annot allocate memory|not enough memory|running low on memory|OutOfMemoryError",
        "memory is full: take fewer workers, of which results do not depend, or a machine with more of it",
        True,
    ),
    Remedy(
        "[Tt]imed out|[Tt]imeout|Watchdog caught",
        "a worker was silent for timeout= seconds, see the logs of the run; a larger timeout= waits longer",
        True,
    ),
    Remedy(f"{LOST_PEER}|Connection (reset|refused)|Broken pipe|NCCL error", "", True),
)


def call_interruptibly(function: Callable[[], Result]) -> Result:
    """Call a function in a thread of its own, so that Ctrl-C and SIGTERM raise KeyboardInterrupt here.

    In the main thread Ray would take them, or they would be lost in a library's callback.

    Returns:
        What the function returns; what it raises is raised here.
    """
    call = call_in_thread(function)
    stop_requested = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {number: signal.signal(number, lambda *_: stop_requested.set()) for number in signals}
    try:
        while not call.done():
            wait([call], 0.2)
            if stop_requested.is_set():
                raise KeyboardInterrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return call.result()


def call_in_thread(function: Callable[[], Result]) -> Future[Result]:
    """Call a function in a thread of its own, for which nobody waits when the process ends."""
    call: Future[Result] = Future()

    def run() -> None:
        try:
            call.set_result(function())
        except BaseException as error:  # raised in the caller's thread, by call.result()
            call.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return call


def explain_failure(error: BaseException) -> RunFailed:
    """Return a failure of workers in words: the first cause, what to do, and whether the same command goes on."""
    cause = first_cause(error)
    if remedy := remedy_of(cause):
        return RunFailed(f"{cause}; {remedy.advice}" if remedy.advice else cause, remedy.goes_on)
    root = _root_cause(_first_of_workers(error))
    of_machines = isinstance(root, OSError) or (_is_of_ray(root) and not _is_of_a_task(root))
    return RunFailed(cause, goes_on=of_machines, is_bug=not of_machines and not isinstance(root, ValueError))


def remedy_of(cause: str) -> Remedy | None:
    """Return what to do about a failure by its text; None where it is not known."""
    return next((remedy for remedy in REMEDIES if re.search(remedy.pattern, cause)), None)


def first_cause(error: BaseException) -> str:
    """Describe in one line what made workers fail first."""
    error = _root_cause(_first_of_workers(error))
    if means_storage_not_shared(error):
        return "storage: a node does not see the run's folder, which all nodes must share"
    lines = str(error).strip().splitlines() or [""]
    # What another process raised comes as its traceback, whose last line is the message.
    foreign = _is_of_ray(error) or "DataLoader worker" in lines[0]
    return lines[-1] if foreign else f"{type(error).__name__}: {lines[0]}"


def _first_of_workers(error: BaseException) -> BaseException:
    """Return the error of the worker that failed first, or the error itself where it is not of several workers."""
    worker_errors = getattr(error, "worker_failures", None)
    if not worker_errors:
        return error
    causes = [_root_cause(worker_error) for worker_error in worker_errors.values()]
    # When one worker fails, the others fail waiting for it: theirs is not the reason.
    return next((cause for cause in causes if LOST_PEER not in str(cause)), causes[0])


def _is_of_ray(error: BaseException) -> bool:
    """Whether an error is one of Ray's; where Ray is not imported there are none."""
    ray = sys.modules.get("ray")
    return ray is not None and isinstance(error, ray.exceptions.RayError)


def _is_of_a_task(error: BaseException) -> bool:
    """Whether one of Ray's errors tells what a function of ours raised, and not that a process or a node is lost."""
    return isinstance(error, sys.modules["ray"].exceptions.RayTaskError)


def _root_cause(error: BaseException) -> BaseException:
    for attribute in ("controller_failure", "cause", "__cause__"):
        inner = getattr(error, attribute, None)
        if isinstance(inner, BaseException):
            return _root_cause(inner)
    return error
