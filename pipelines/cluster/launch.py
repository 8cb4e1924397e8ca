"""From a config to workers and back: Ray, progress, failures in words. Used by training and evaluation."""

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer
from rich.console import Console

from pipelines.cluster import worker
from pipelines.cluster.failures import call_interruptibly, first_cause
from pipelines.cluster.network import ByRaysNetwork
from pipelines.cluster.progress import Bar, Board
from pipelines.config.schema import Config
from pipelines.console import RunFailed


def run_in_process(
    loop: Callable[[dict[str, Any]], Any],
    config: Config,
    job: dict[str, Any],
    report: Callable[[dict[str, Any]], object] = dict,
) -> dict[str, float]:
    """Run a loop in this process, as Ray Train's only worker: without the seconds that processes take to start.

    report: called with what the loop reports, in Ray Train's place; by default nobody looks.
    """
    threads = torch.get_num_threads()
    settings = {"config": config.model_dump(exclude_none=True), "cpus": threads, "board": None, "report": report}
    trainer = TorchTrainer(
        loop, train_loop_config=job | settings, scaling_config=ray.train.ScalingConfig(num_workers=0)
    )
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    try:
        return trainer.fit().return_value  # type: ignore[attr-defined]
    except Exception as error:
        raise RunFailed(first_cause(error)) from error
    finally:
        torch.set_num_threads(threads)


def run_on_workers(
    loop: Callable[[dict[str, Any]], Any],
    config: Config,
    job: dict[str, Any],
    storage: str,
    name: str,
    console: Console,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> dict[str, float]:
    """Run a loop on config.workers workers, showing its progress; what rank 0 returns. RunFailed tells the cause."""
    low, high = config.worker_range
    nodes = len(ray.nodes())
    cores = os.cpu_count() or 1 if nodes == 1 else ray.cluster_resources()["CPU"]
    cpus = max(1, int(cores // high))
    failures = (3 if nodes > 1 else 0) if config.max_failures is None else config.max_failures
    per_worker = {"CPU": 1.0} | ({"GPU": 1.0} if config.use_gpu else {})
    # Where this process is: that node is lost last.
    here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}  # type: ignore[attr-defined]
    board = Board.options(label_selector=here).remote()  # type: ignore[attr-defined]
    settings = {"config": config.model_dump(exclude_none=True), "cpus": cpus, "board": board, "report": None}
    trainer = TorchTrainer(
        # Not as train_loop_config, which Ray shows on its page: the tracking server's address may hold a password.
        partial(
            worker.enter,
            (loop.__module__, loop.__qualname__),
            job | settings,
            storage == config.storage and f"{storage}/{name}/run.json",
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=low if low == high else (low, high),  # type: ignore[arg-type]
            use_gpu=bool(config.use_gpu),
            resources_per_worker=per_worker,
        ),
        torch_config=ByRaysNetwork(backend="nccl" if config.use_gpu else "gloo", timeout_s=config.timeout),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=failures),
            callbacks=list(callbacks),  # type: ignore[arg-type]
        ),
    )
    with Bar(board, console):
        try:
            return call_interruptibly(trainer.fit).return_value
        except Exception as error:
            raise RunFailed(first_cause(error)) from error
