"""A notice that a node is about to be taken away (a spot instance, a drain): what is not stored until then is lost."""

import importlib
from typing import Any, Literal

import pyarrow.fs
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from pipelines.config.schema import Config


def enter(loop: tuple[str, str], job: dict[str, Any], written: str | Literal[False]) -> Any:
    """In a worker. loop: by name, as Ray's controller, which unpacks it too, need not import networks and losses.
    written: a file of the driver's, that this node must see; folders Ray Train makes by itself."""
    if written:
        files, path = pyarrow.fs.FileSystem.from_uri(written)
        if files.get_file_info(path).type == pyarrow.fs.FileType.NotFound:
            node = ray.util.get_node_ip_address()
            raise FileNotFoundError(
                f"storage: node {node} does not see {written}; a folder that all nodes share, s3:// or gs:// is needed"
            )
    return getattr(importlib.import_module(loop[0]), loop[1])(job)


last_notice: Any = None


def preemption_noticed() -> bool:
    """Whether this worker of Ray Train has been told of one since the last look.

    ray.train.get_preemption_info would say the same, but has all workers meet in an actor, at every step; here rank 0
    alone looks, into its own process, as it alone stores checkpoints.
    """
    global last_notice
    from ray.train.v2._internal.execution.context import get_train_context

    try:
        found = get_train_context().preemption_context.preemption_info
    except RuntimeError:  # no worker of Ray Train
        return False
    found, last_notice = found != last_notice, found
    return found and last_notice is not None


def device_of_worker(config: Config) -> torch.device:
    """Of this worker."""
    if not config.use_gpu:
        return torch.device("cpu")
    return ray.train.torch.get_device() if dist.is_initialized() else torch.device("cuda")
