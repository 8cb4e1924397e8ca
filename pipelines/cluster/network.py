"""Join the workers of Ray Train to a group of torch.distributed, over the network by which Ray knows their nodes.

Ray Train's own TorchConfig does the same, but for two things. It imports torch in the driver and in the controller,
which delays the workers by seconds. And gloo listens where the machine's own name leads, which on many is loopback
(Debian's /etc/hosts): workers of other machines then find nobody. The interface of the address by which Ray knows the
node is right on all of them.
"""

import logging
import os
import socket
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.backend import Backend, BackendConfig

LEAVING_TIMEOUT_S = 30


@dataclass
class GroupConfig(BackendConfig):
    """The workers' group.

    Attributes:
        backend: "gloo" or "nccl".
        timeout_s: After so many seconds a worker that waits for another fails.
    """

    backend: str
    timeout_s: int

    @property
    def backend_cls(self) -> type[Backend]:
        return GroupBackend


class GroupBackend(Backend):
    """Called by Ray Train's controller when its workers start and end."""

    share_cuda_visible_devices = True  # a worker sees the GPUs of all workers of its node, and uses its own

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Form the group."""
        address = worker_group.execute_single(0, free_address)
        joining = [
            worker_group.execute_single_async(rank, join_group, backend_config, address, rank, len(worker_group))
            for rank in range(len(worker_group))
        ]
        ray.get(joining)

    def on_training_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Tell each worker its place, as torchrun does."""
        worker_group.execute(set_place)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """End the group; a worker that hangs is ended by Ray Train soon after."""
        leaving = worker_group.execute_async(leave_group)
        try:
            ray.get(leaving, timeout=LEAVING_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:
            logging.getLogger(__name__).warning("a worker did not leave the group", exc_info=True)


def free_address() -> tuple[str, int]:
    """Return this node's address in Ray and a free port on it."""
    node_address = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in node_address else socket.AF_INET) as probe:
        probe.bind((node_address, 0))
        return node_address, probe.getsockname()[1]


def join_group(config: BackendConfig, address: tuple[str, int], rank: int, world_size: int) -> None:
    """Join the group, in a worker; returns when all have."""
    from datetime import timedelta

    import torch.distributed as dist

    assert isinstance(config, GroupConfig)
    choose_interface()
    # Of an operation that times out NCCL then tells, instead of leaving the others to wait.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address[0], str(address[1])
    timeout = timedelta(seconds=config.timeout_s)
    dist.init_process_group(config.backend, rank=rank, world_size=world_size, timeout=timeout)


def choose_interface() -> None:
    """Set GLOO_SOCKET_IFNAME in a worker, before it joins the group. What the node's owner has set stays."""
    node_address = ray.util.get_node_ip_address()
    for interface, addresses in psutil.net_if_addrs().items():
        if node_address in {entry.address for entry in addresses}:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def set_place() -> None:
    """Set the variables by which torch's libraries know a worker's place."""
    import ray.train

    context = ray.train.get_context()
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())
    os.environ["LOCAL_WORLD_SIZE"] = str(context.get_local_world_size())
    os.environ["NODE_RANK"] = str(context.get_node_rank())
    os.environ["RANK"] = str(context.get_world_rank())
    os.environ["WORLD_SIZE"] = str(context.get_world_size())


def leave_group() -> None:
    """Leave the group, in a worker."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
