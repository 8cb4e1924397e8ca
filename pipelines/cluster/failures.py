"""Explain in one line why workers failed; call a function so that Ctrl-C reaches us."""

import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from pipelines.cluster.ray_private import means_storage_not_shared

Result = TypeVar("Result")
LOST_PEER = "Connection closed by peer"  # what gloo says in the workers that wait for one that failed


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


def first_cause(error: BaseException) -> str:
    """Describe in one line what made workers fail first."""
    worker_errors = getattr(error, "worker_failures", None)
    if worker_errors:
        causes = [_root_cause(worker_error) for worker_error in worker_errors.values()]
        # When one worker fails, the others fail waiting for it: theirs is not the reason.
        error = next((cause for cause in causes if LOST_PEER not in str(cause)), causes[0])
    error = _root_cause(error)
    if means_storage_not_shared(error):
        return "storage: a node does not see the run's folder, which all nodes must share"
    lines = str(error).strip().splitlines() or [""]
    # What another process raised comes as its traceback, whose last line is the message.
    foreign = _is_of_ray(error) or "DataLoader worker" in lines[0]
    return lines[-1] if foreign else f"{type(error).__name__}: {lines[0]}"


def _is_of_ray(error: BaseException) -> bool:
    """Whether an error is one of Ray's; where Ray is not imported there are none."""
    ray = sys.modules.get("ray")
    return ray is not None and isinstance(error, ray.exceptions.RayError)


def _root_cause(error: BaseException) -> BaseException:
    for attribute in ("controller_failure", "cause", "__cause__"):
        inner = getattr(error, attribute, None)
        if isinstance(inner, BaseException):
            return _root_cause(inner)
    return error
