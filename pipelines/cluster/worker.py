"""What runs in a worker before its loop: what it is given, the check of shared storage, its device."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow.fs
import ray
import ray.train.torch
import torch
import torch.distributed as dist
from ray.actor import ActorHandle

from pipelines.cluster.ray_private import preemption_notice
from pipelines.config.schema import Config

Report = Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class Worker:
    """A worker's share of the machine, and whom it tells of its progress.

    Attributes:
        cpus: CPUs of this worker.
        board: Where rank 0 writes what it is doing; None: nobody looks.
        report: Called with the metrics of each validated epoch; None: Ray Train's own report.
    """

    cpus: int = 1
    board: ActorHandle | None = None
    report: Report | None = None


@dataclass(frozen=True)
class Job:
    """What every loop is given: the config, the pictures to leave out, and this worker's share of the machine.

    Attributes:
        loop: "module:function". By name: Ray's controller unpacks jobs, too, and need not import networks.
        config: With `use_gpu` and `precision` made definite, see devices.resolve_devices.
        unreadable: Names of pictures to leave out of the set.
        worker: Filled in by launch.py.
    """

    loop: ClassVar[str]
    config: Config
    unreadable: tuple[str, ...] = ()
    worker: Worker = field(default_factory=Worker)


def enter(job: Job, must_see: str | None) -> Any:
    """Run a job's loop in a worker of Ray Train.

    Args:
        job: Names its loop, and is what it is given.
        must_see: A file of the driver's that this node must see, as a path or URL; None: nothing is to be kept.

    Returns:
        What the loop returns.

    Raises:
        FileNotFoundError: This node does not see the file; Ray Train makes missing folders by itself.
    """
    if must_see:
        files, path = pyarrow.fs.FileSystem.from_uri(must_see)
        if files.get_file_info(path).type == pyarrow.fs.FileType.NotFound:
            node = ray.util.get_node_ip_address()
            raise FileNotFoundError(
                f"storage: node {node} does not see {must_see}; a folder that all nodes share, s3:// or gs:// is needed"
            )
    module, _, function = job.loop.partition(":")
    return getattr(importlib.import_module(module), function)(job)


class PreemptionWatch:
    """Tells whether this worker's node is about to be taken away (a spot instance, a drain).

    What is not stored until then is lost.
    """

    def __init__(self) -> None:
        self.last_notice: object | None = None

    def new_notice(self) -> bool:
        """Whether a notice has come since the last call."""
        notice = preemption_notice()
        is_new = notice is not None and notice != self.last_notice
        self.last_notice = notice
        return is_new


def device_of_worker(config: Config) -> torch.device:
    """Return the device that this worker computes on."""
    if not config.use_gpu:
        return torch.device("cpu")
    return ray.train.torch.get_device() if dist.is_initialized() else torch.device("cuda")
