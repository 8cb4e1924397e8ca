"""What Ray costs: the same training under Ray Train (`launch.run`) and under torchrun, without Ray.

    python benchmarks/launchers.py [RECIPE [KEY=VALUE]...] [--workers 1 2] [--repeats 5] [--epochs 5] [--steps 40]

Both run pipelines.train.train_loop on the same config, with as many threads a worker, one validation and one checkpoint
at the end, no test and no MLflow. images/s: of the steps of an epoch, median of all epochs but the first. Seconds: from
the start of the command until it has ended, Ray's own start and stop included. The two ways in turn, first the one and
then the other, so that other load on the machine falls on both alike; ratios are the medians of those of the pairs.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from pipelines import checkpoint
from pipelines.config import Config
from pipelines.recipe import load, parse

JOB = {"run_id": None, "tracking_uri": None, "unreadable": [], "test": False}
WAYS = ("ray", "torchrun")


class Speed(NamedTuple):
    images_per_second: float
    seconds: float


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
        done = subprocess.run([*command, __file__, f"--{way}", given], capture_output=True, text=True, env=environment)
        seconds = time.perf_counter() - started
        if done.returncode:
            sys.exit(done.stderr)
        history = checkpoint.read_history(Path(storage, "run", checkpoint.folder_name(config.epochs)))
    speeds = [record["metrics"]["train/images_per_second"] for record in history[1:]]
    return Speed(statistics.median(speeds), seconds)


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
    if options.epochs < 2:
        sys.exit("--epochs: at least 2, as the first is not counted")
    fixed = [f"epochs={options.epochs}", f"steps_per_epoch={options.steps}", f"evaluate_every={options.epochs}"]
    fixed += ["use_gpu=false", "precision=float32", "data.loader=torch", *options.assignments]
    configs = {workers: load(options.recipe, [*fixed, f"workers={workers}"]) for workers in options.workers}
    found: dict[tuple[int, str], list[Speed]] = {(workers, way): [] for workers in configs for way in WAYS}
    for repeat in range(options.repeats):
        for workers, config in configs.items():
            for way in WAYS if repeat % 2 else reversed(WAYS):
                speed = timed(way, config)
                found[workers, way].append(speed)
                told = f"{workers} workers, {way}: {speed.images_per_second:.0f} images/s, {speed.seconds:.0f} s"
                print(told, file=sys.stderr, flush=True)
    print("| workers | Ray, images/s | torchrun, images/s | Ray / torchrun | lowest, highest | Ray, s | torchrun, s |")
    print("|---" * 7 + "|")
    for workers in configs:
        pairs = zip(found[workers, "ray"], found[workers, "torchrun"], strict=True)
        ratios = [ray.images_per_second / bare.images_per_second for ray, bare in pairs]
        speeds = [statistics.median(s.images_per_second for s in found[workers, way]) for way in WAYS]
        seconds = [statistics.median(s.seconds for s in found[workers, way]) for way in WAYS]
        cells = [str(workers), *(f"{speed:.0f}" for speed in speeds), f"{statistics.median(ratios):.3f}"]
        cells += [f"{min(ratios):.3f}, {max(ratios):.3f}", *(f"{second:.0f}" for second in seconds)]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
