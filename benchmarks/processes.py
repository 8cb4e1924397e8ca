"""Who uses the CPU while workers of a local Ray train: percent of one core, process by process.

    python benchmarks/processes.py [--workers 2] [--seconds 20]

CPU times of the command and of all that it started, over some seconds in the middle of `dml train glyphs`. Workers are
the training itself; what the others use, workers that share all cores with them lose.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import psutil
from rich.console import Console
from rich.table import Table


class Usage(NamedTuple):
    """CPU seconds of a process so far, and how often it gave up the CPU by itself."""

    name: str
    seconds: float
    switches: int


def name_of(process: psutil.Process) -> str:
    """Return "ray::..." or the program's file."""
    words = process.cmdline()
    line = " ".join(words)
    if line.startswith("ray::"):
        return line.split()[0]
    if "multiprocessing" in line:
        return "MLflow's process" if "spawn_main" in line else "multiprocessing"
    files = [os.path.basename(word) for word in words if word.endswith((".py", "/raylet", "/gcs_server"))]
    return files[0] if files else "dml"


def usage(root: psutil.Process) -> dict[int, Usage]:
    """Return what each process below `root`, and itself, has used, by id."""
    used = {}
    for process in [root, *root.children(recursive=True)]:
        try:
            times = process.cpu_times()
            switches = process.num_ctx_switches().voluntary
            used[process.pid] = Usage(name_of(process), times.user + times.system, switches)
        except psutil.Error:  # it has ended
            continue
    return used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pipelines.cli", "train", "glyphs", "epochs=1", "steps_per_epoch=100000"]
        command += [f"workers={options.workers}", "name=watched"]
        with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True) as run:
            assert run.stderr
            if not any(line.startswith("training") for line in run.stderr):
                sys.exit("the training did not start")
            time.sleep(5)
            first = usage(psutil.Process(run.pid))
            time.sleep(options.seconds)
            last = usage(psutil.Process(run.pid))
            os.killpg(run.pid, signal.SIGINT)
    rows = [
        (100 * (last[pid].seconds - first[pid].seconds) / options.seconds, last[pid].name, pid)
        for pid in first.keys() & last.keys()
    ]
    table = Table(title=f"{options.workers} workers, {options.seconds:g} s")
    for head in ("process", "% of one core", "waits a second"):
        table.add_column(head, justify="left" if head == "process" else "right")
    for percent, name, pid in sorted(rows, reverse=True):
        switches = (last[pid].switches - first[pid].switches) / options.seconds
        table.add_row(name, f"{percent:.1f}", f"{switches:.0f}")
    total = sum(percent for percent, name, _ in rows if "RayTrainWorker" not in name)
    table.add_row("all but the workers", f"{total:.1f}", "")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
