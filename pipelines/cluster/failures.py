"""Explain in one line why workers failed; call a function so that Ctrl-C reaches us."""

import signal
import threading
from collections.abc import Callable
from typing import Any

import ray
import ray.train


def call_interruptibly(function: Callable[[], Any]) -> Any:
    """function() in a thread of its own, where Ray leaves Ctrl-C and SIGTERM to us: they raise KeyboardInterrupt here,
    and are not lost in a library's callback."""
    outcome: list[Any] = []
    asked = threading.Event()

    def call() -> None:
        try:
            outcome.extend((function(), None))
        except BaseException as error:  # handed to the caller's thread, which knows what to say
            outcome.extend((None, error))

    thread = threading.Thread(target=call, daemon=True)
    main = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {number: signal.signal(number, lambda *_: asked.set()) for number in signals}
    try:
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
            if asked.is_set():
                raise KeyboardInterrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def first_cause(error: BaseException) -> str:
    """One line that names the first cause."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        causes = [_root_cause(e) for e in failures.values()]
        # When one worker fails, the others fail waiting for it: theirs is not the reason.
        error = next((c for c in causes if "Connection closed by peer" not in str(c)), causes[0])
    error = _root_cause(error)
    if "Unable to set up cluster storage" in str(error):  # Ray Train's own look, on each node that has a worker
        return "storage: a node does not see the run's folder, which all nodes must share"
    lines = str(error).strip().splitlines() or [""]
    # What another process raised comes as its traceback, whose last line is the message.
    foreign = isinstance(error, ray.exceptions.RayError) or "DataLoader worker" in lines[0]
    return lines[-1] if foreign else f"{type(error).__name__}: {lines[0]}"


def _root_cause(error: BaseException) -> BaseException:
    for attribute in ("_base_exc", "controller_failure", "cause", "__cause__"):
        inner = getattr(error, attribute, None)
        if isinstance(inner, BaseException):
            return _root_cause(inner)
    return error
