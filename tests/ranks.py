"""Real gloo processes, forked from one that has imported torch already."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What ranks need, the modules with their functions among it, is imported once for all of a process's tests.
USERS = ["dml_core.test_gather", "dml_core.test_gradients", "dml_core.test_variation"]
USERS += ["pipelines.runs.test_any_worker_count", "dml_core.retrieval.test_metrics", "dml_core.retrieval.test_mutual"]
USERS += ["dml_core.retrieval.test_task", "pipelines.runs.test_start_from"]
mp.set_forkserver_preload(["pipelines.training.loop", "torch._dynamo", *(f"tests.{name}" for name in USERS)])


def run(function: Callable[..., Any], world: int, *arguments: Any) -> None:
    """function(*arguments) on each rank of a process group, on one thread."""
    with tempfile.TemporaryDirectory() as store:
        given = (world, f"file://{store}/store", function, arguments)
        mp.start_processes(_one, given, nprocs=world, start_method="forkserver")


def _one(rank: int, world: int, store: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    function(*arguments)
    dist.destroy_process_group()
