"""What runs in a worker before its loop: what it is given, the check of shared storage, its device."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow.fs

from dml_core.data.datasets import SetIdentity
from pipelines.cluster.progress import Board
from pipelines.cluster.ray_private import preemption_notice
from pipelines.config.schema import Config

if TYPE_CHECKING:
    import torch

Report = Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class Worker:
    """A worker's share of the machine, and whom it tells of its progress.

    Attributes:
        cpus: CPUs of this worker.
        board: Where rank 0 writes what it is doing and has measured; None: nobody looks.
        report: Called with the metrics of each validated epoch; None: Ray Train's own, on one of its workers.
    """

    cpus: int = 1
    board: Board | None = None
    report: Report | None = None

    @property
    def is_of_ray_train(self) -> bool:
        """Whether this is a worker of Ray Train, not the process of a driver or of a trial."""
        return self.report is None


@dataclass(frozen=True)
class Job:
    """What every loop is given: the config, the pictures to leave out, and this worker's share of the machine.

    Attributes:
        loop: "module:function". By name: Ray's controller unpacks jobs, too, and need not import networks.
        config: With `use_gpu` and `precision` made definite, see devices.resolve_devices.
        unreadable: Names of pictures to leave out of the set.
        data: What the set is, as the driver has found once for all workers; None: each worker looks for itself.
        worker: Filled in by launch.py.
    """

    loop: ClassVar[str]
    config: Config
    unreadable: tuple[str, ...] = ()
    data: SetIdentity | None = None
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
            import ray

            node = ray.util.get_node_ip_address()
            raise FileNotFoundError(
                f"storage: node {node} does not see {must_see}; a folder that all nodes share, s3:// or gs:// is needed"
            )
    module, _, function = job.loop.partition(":")
    return getattr(importlib.import_module(module), function)(job)


class PreemptionWatch:
    """Tells whether this worker's node is about to be taken away (a spot instance, a drain).

    What is not stored until then is lost.

    Attributes:
        is_on: Whether there is somebody to give notice: Ray Train.
    """

    def __init__(self, is_on: bool):
        self.is_on = is_on
        self.last_notice: object | None = None

    def new_notice(self) -> bool:
        """Whether a notice has come since the last call."""
        notice = preemption_notice() if self.is_on else None
        is_new = notice is not None and notice != self.last_notice
        self.last_notice = notice
        return is_new


def device_of_worker(config: Config) -> "torch.device":
    """Return the device that this worker computes on."""
    import torch  # by workers alone: the driver imports this module for its jobs
    import torch.distributed as dist

    if not config.use_gpu:
        return torch.device("cpu")
    if not dist.is_initialized():
        return torch.device("cuda")
    from ray.train.torch import get_device  # of Ray Train alone: its import takes a second

    return get_device()
