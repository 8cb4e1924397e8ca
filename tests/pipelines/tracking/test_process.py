"""The process that MLflow runs in during a training."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

from pipelines.tracking.process import SameProcess, tracking_process
from pipelines.tracking.server import prepare_store


def has_mlflow() -> tuple[int, bool]:
    return os.getpid(), "mlflow" in sys.modules


def wait_until(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def test_it_imports_mlflow_lives_through_signals_to_all_of_a_job_and_raises_here_what_was_raised_there() -> None:
    with tracking_process() as tracker:
        pid, imported = tracker.submit(has_mlflow).result()
        assert pid != os.getpid() and imported
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
        with pytest.raises(ValueError, match="not an http"):
            tracker.submit(prepare_store, "somewhere").result()
        assert tracker.submit(has_mlflow).result()[0] == pid
    assert not psutil.pid_exists(pid)


def test_it_ends_with_a_parent_that_is_killed() -> None:
    program = (
        "import os, time\n"
        "from pipelines.tracking.process import tracking_process\n"
        "with tracking_process() as tracker:\n"
        "    print(tracker.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        parent.kill()
    assert wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_the_same_process_raises_where_the_result_is_asked_for() -> None:
    call = SameProcess().submit(int, "three")
    with pytest.raises(ValueError):
        call.result()
    assert SameProcess().submit(os.getpid).result() == os.getpid()
    assert not multiprocessing.active_children()
