"""What Ray costs: the same training under Ray Train (`launch.run_on_workers`) and under torchrun, without Ray.

    python benchmarks/launchers.py [RECIPE [KEY=VALUE]...] [--workers 1 2] [--epochs 40] [--steps 10] [--turn 2]

Both run training.loop.train_loop on the same config, with as many threads a worker, one validation and one checkpoint
at the end, no test and no MLflow. Once both train they take turns of --turn seconds: all processes of the one, Ray's
own included, are stopped (SIGSTOP) while the other goes on, so that whatever else happens on the machine falls on both.
images/s: pictures of the epochs that both were in, the first two left out, over the seconds that the one was not
stopped. CPU: what all its processes used meanwhile, per 1,000 images. More than 1 is in favour of Ray; in brackets the
lowest and the highest of ten parts of that time, one after the other.
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import psutil

from dml_core.cpus import usable_cpus
from pipelines.cluster.worker import Worker
from pipelines.config.recipe import load_recipe, parse_config
from pipelines.config.schema import Config
from pipelines.console import QUIET
from pipelines.models.checkpoint import read_history
from pipelines.models.run_folder import checkpoint_name
from pipelines.training.job import TrainingJob

WAYS = ("ray", "torchrun")
NAMES = {"images_per_second": "images/s", "cpu": "CPU s per 1,000 images"}


class Speed(NamedTuple):
    """cpu: seconds of a core per 1,000 images."""

    images_per_second: float
    cpu: float


class Running:
    """A training and all processes below it, which can be stopped and go on; seconds it was going, and of CPU."""

    def __init__(self, way: str, config: Config, storage: str):
        given = config.model_copy(update={"storage": storage, "name": way}).model_dump_json(exclude_none=True)
        command = [sys.executable]
        if way == "torchrun":
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.workers}"]
        # Ray and torchrun with several workers ask libraries for one thread a worker; torchrun with one does not.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.folder, self.errors = Path(storage, way), Path(storage, f"{way}.errors")
        with self.errors.open("wb") as file:
            self.process = psutil.Popen(
                [*command, __file__, f"--{way}", given], env=environment, stdout=subprocess.DEVNULL, stderr=file
            )
        self.by_process: dict[int, float] = {}
        self.times, self.going, self.cpu = list[float](), list[float](), list[float]()

    def tree(self) -> list[psutil.Process]:
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:  # it has ended
            return []

    def note(self, went: float) -> None:
        """That it was going for so many seconds until now."""
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                self.by_process[process.pid] = times.user + times.system
        self.times.append(time.time())
        self.going.append((self.going or [0.0])[-1] + went)
        self.cpu.append(sum(self.by_process.values()))

    def send(self, number: signal.Signals) -> None:
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def ended(self) -> bool:
        code = self.process.poll()
        if code:
            sys.exit(self.errors.read_text())
        return code is not None

    def speed(self, epochs: list[float], images: int, start: float, end: float) -> Speed:
        """epochs: when each ended; images: of one."""
        done = np.interp([start, end], epochs, np.arange(len(epochs)) * images)
        went, used = (np.interp([start, end], self.times, values) for values in (self.going, self.cpu))
        count = done[1] - done[0]
        return Speed(count / (went[1] - went[0]), (used[1] - used[0]) / count * 1e3)


@dataclass(frozen=True)
class MarkedJob(TrainingJob):
    """A training that tells when its process is there."""

    loop: ClassVar[str] = "launchers:marked_loop"


def marked_loop(job: MarkedJob) -> dict[str, float]:
    """In a worker: training, after it has told that its process is there."""
    from pipelines.training.loop import train_loop

    Path(job.config.storage, f"{job.config.name}.begun").touch()
    return train_loop(job)


def under_ray(config: Config) -> None:
    """The driver, as `dml train` is."""
    from launchers import MarkedJob  # workers import it by this name

    from pipelines.cluster.launch import run_on_workers
    from pipelines.cluster.session import open_cluster

    assert config.name
    Path(config.storage, config.name).mkdir()
    Path(config.storage, config.name, "run.json").touch()  # looked for by the workers
    with open_cluster(config, None):
        run_on_workers(MarkedJob(config, test=False), config.storage, config.name, QUIET)


def under_torchrun(config: Config) -> None:
    """One worker."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    cpus = max(1, usable_cpus() // dist.get_world_size())  # as launch.run_on_workers deals them on one machine
    marked_loop(MarkedJob(config, test=False, worker=Worker(cpus=cpus, report=dict)))
    dist.destroy_process_group()


def in_turns(config: Config, turn: float) -> dict[str, list[Speed]]:
    """Speeds of both ways in ten parts of the time that both trained, after those of the whole of it."""
    with tempfile.TemporaryDirectory() as storage:
        running = {}
        for way in reversed(WAYS):  # Ray, which takes longer to start and likes it less to be stopped, comes last
            one = running[way] = Running(way, config, storage)
            while not Path(storage, f"{way}.begun").exists():
                assert not one.ended()
                time.sleep(0.2)
            one.send(signal.SIGSTOP)
        while not any(one.ended() for one in running.values()):
            for one in running.values():
                one.note(0.0)
                one.send(signal.SIGCONT)
                started = time.time()
                time.sleep(turn)
                one.send(signal.SIGSTOP)
                one.note(time.time() - started)
        for one in running.values():
            one.send(signal.SIGCONT)
        for one in running.values():
            while not one.ended():
                time.sleep(0.2)
        epochs = {}
        for way, one in running.items():
            history = read_history(one.folder / checkpoint_name(config.epochs))
            epochs[way] = [record["time"] / 1e3 for record in history][:-1]  # the last one is validated
    images = config.batch.size * (config.steps_per_epoch or 0)
    start, end = max(times[1] for times in epochs.values()), min(times[-1] for times in epochs.values())
    ends = np.linspace(start, end, 11)
    parts = [(start, end), *itertools.pairwise(ends)]
    return {way: [one.speed(epochs[way], images, *part) for part in parts] for way, one in running.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="glyphs")
    parser.add_argument("assignments", nargs="*", default=[])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--turn", type=float, default=2.0)
    for way in WAYS:
        parser.add_argument(f"--{way}", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ray:
        under_ray(parse_config(json.loads(options.ray)))
    elif options.torchrun:
        under_torchrun(parse_config(json.loads(options.torchrun)))
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    fixed = [f"epochs={options.epochs}", f"steps_per_epoch={options.steps}", f"evaluate_every={options.epochs}"]
    fixed += ["use_gpu=false", "precision=float32", "data.loader=torch", *options.assignments]
    print("| workers | | Ray | torchrun | ratio (lowest, highest of ten parts) |\n|---|---|---|---|---|", flush=True)
    for workers in options.workers:
        found = in_turns(load_recipe(options.recipe, [*fixed, f"workers={workers}"]), options.turn)
        for name, digits in (("images_per_second", 0), ("cpu", 2)):
            ours, bare = (np.array([getattr(speed, name) for speed in found[way]]) for way in WAYS)
            ratio = ours / bare if name == "images_per_second" else bare / ours
            told = f"{ratio[0]:.3f} ({ratio[1:].min():.3f}, {ratio[1:].max():.3f})"
            cells = [str(workers), NAMES[name], *(f"{values[0]:.{digits}f}" for values in (ours, bare)), told]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
