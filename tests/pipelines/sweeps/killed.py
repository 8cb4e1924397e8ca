"""Sweeps that are killed in their middle, and what must hold when they went on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil


def kill_sweep(arguments: list[str], folder: Path, is_time: Callable[[], bool]) -> None:
    """Start `dml tune` in a process of its own, and kill it and all that it started.

    Args:
        arguments: Of the command.
        folder: Where its output goes, to the file "log".
        is_time: Whether to kill it now.
    """
    log = folder / "log"
    with open(log, "ab") as output:
        command = [sys.executable, "-m", "pipelines.cli", "tune", *arguments]
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    deadline = time.monotonic() + 240
    while not is_time():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.02)
    everyone = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    for child in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


def change_times(sweep: Path, name: str) -> dict[Path, int]:
    """When each file of a name, of the trials in a sweep's folder, was last written."""
    return {path: path.stat().st_mtime_ns for path in sweep.glob(f"t*/{name}")}
