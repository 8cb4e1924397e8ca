"""What Ray costs: the same training under Ray Train (`launch.run`) and under torchrun, without Ray.

    python benchmarks/launchers.py [RECIPE [KEY=VALUE]...] [--workers 1 2] [--repeats 5] [--epochs 5] [--steps 40]

Both run pipelines.train.train_loop on the same config, with as many threads a worker, one validation and one checkpoint
at the end, no test and no MLflow. images/s: of the steps of an epoch, median of all epochs but the first. CPU: what all
processes, Ray's own included, used per 1,000 images between the end of the first epoch and that of the last but one,
where nothing but steps happens; on a machine that others use it says more than the clock. Seconds: from the start of
the command until it has ended, Ray's start and stop included. The two ways in turn, first the one and then the other;
ratios are the medians of those of the pairs, and more than 1 is in favour of Ray.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from pipelines import checkpoint
from pipelines.config import Config
from pipelines.recipe import load, parse

JOB = {"run_id": None, "tracking_uri": None, "unreadable": [], "test": False}
WAYS = ("ray", "torchrun")
NAMES = {"images_per_second": "images/s", "cpu": "CPU s per 1,000 images", "seconds": "seconds in all"}


class Speed(NamedTuple):
    """cpu: seconds of a core per 1,000 images."""

    images_per_second: float
    cpu: float
    seconds: float


class Used:
    """CPU seconds of a process and all below it, those that have ended too, looked at again and again."""

    def __init__(self, process: int):
        self.root, self.ended = psutil.Process(process), threading.Event()
        self.by_process: dict[int, float] = {}
        self.times, self.totals = [time.time()], [0.0]
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self) -> None:
        while not self.ended.wait(0.3):
            try:
                for process in [self.root, *self.root.children(recursive=True)]:
                    times = process.cpu_times()
                    self.by_process[process.pid] = times.user + times.system
            except psutil.NoSuchProcess:
                continue
            self.times.append(time.time())
            self.totals.append(sum(self.by_process.values()))

    def between(self, start: float, end: float) -> float:
        self.ended.set()
        self.thread.join()
        first, last = np.interp([start, end], self.times, self.totals)
        return float(last - first)


def under_ray(config: Config) -> None:
    """The driver, as `dml train` is."""
    from rich.console import Console

    from pipelines import launch
    from pipelines.train import train_loop

    assert config.name
    with launch.cluster(config, None):
        launch.run(train_loop, config, JOB, config.storage, config.name, Console(file=io.StringIO()))


def under_torchrun(config: Config) -> None:
    """One worker."""
    import torch.distributed as dist

    from pipelines.train import train_loop

    dist.init_process_group("gloo")
    cpus = max(1, (os.cpu_count() or 1) // dist.get_world_size())  # as launch.run deals them on one machine
    train_loop(JOB | {"config": config.model_dump(exclude_none=True), "cpus": cpus, "board": None, "report": dict})
    dist.destroy_process_group()


def timed(way: str, config: Config) -> Speed:
    """One training, in processes of its own."""
    with tempfile.TemporaryDirectory() as storage:
        given = config.model_copy(update={"storage": storage, "name": "run"}).model_dump_json(exclude_none=True)
        command = [sys.executable]
        if way == "torchrun":
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.workers}"]
        # Ray and torchrun with several workers ask libraries for one thread a worker; torchrun with one does not.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        started = time.perf_counter()
        errors = Path(storage, "errors")
        with errors.open("wb") as file:
            process = subprocess.Popen(
                [*command, __file__, f"--{way}", given], env=environment, stdout=subprocess.DEVNULL, stderr=file
            )
            used = Used(process.pid)
            code = process.wait()
        seconds = time.perf_counter() - started
        if code:
            sys.exit(errors.read_text())
        history = checkpoint.read_history(Path(storage, "run", checkpoint.folder_name(config.epochs)))
    speeds = [record["metrics"]["train/images_per_second"] for record in history[1:]]
    steps = history[-1]["first_step"] - history[1]["first_step"]  # between the two ends of epochs
    images = steps * config.batch.classes * config.batch.images
    cpu = used.between(history[0]["time"] / 1e3, history[-2]["time"] / 1e3)
    return Speed(statistics.median(speeds), cpu / images * 1e3, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="glyphs")
    parser.add_argument("assignments", nargs="*", default=[])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    for way in WAYS:
        parser.add_argument(f"--{way}", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ray:
        under_ray(parse(json.loads(options.ray)))
    elif options.torchrun:
        under_torchrun(parse(json.loads(options.torchrun)))
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    if options.epochs < 3:
        sys.exit("--epochs: at least 3, as the first is not counted, nor what follows the last")
    fixed = [f"epochs={options.epochs}", f"steps_per_epoch={options.steps}", f"evaluate_every={options.epochs}"]
    fixed += ["use_gpu=false", "precision=float32", "data.loader=torch", *options.assignments]
    configs = {workers: load(options.recipe, [*fixed, f"workers={workers}"]) for workers in options.workers}
    found: dict[tuple[int, str], list[Speed]] = {(workers, way): [] for workers in configs for way in WAYS}
    for repeat in range(options.repeats):
        for workers, config in configs.items():
            for way in WAYS if repeat % 2 else reversed(WAYS):
                speed = timed(way, config)
                found[workers, way].append(speed)
                told = f"{speed.images_per_second:.0f} images/s, {speed.cpu:.2f} CPU s, {speed.seconds:.0f} s"
                print(f"{workers} workers, {way}: {told}", file=sys.stderr, flush=True)
    print("| workers | | Ray | torchrun | ratio: median (lowest, highest) |\n|---|---|---|---|---|")
    for workers in configs:
        for name, digits in (("images_per_second", 0), ("cpu", 2), ("seconds", 0)):
            ours, bare = ([getattr(speed, name) for speed in found[workers, way]] for way in WAYS)
            ratios = [a / b if name == "images_per_second" else b / a for a, b in zip(ours, bare, strict=True)]
            told = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}, {max(ratios):.3f})"
            cells = [str(workers), NAMES[name], *(f"{statistics.median(v):.{digits}f}" for v in (ours, bare)), told]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
