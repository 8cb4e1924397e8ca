"""Workers talk to each other by the network that Ray talks to them.

Gloo listens where the machine's own name leads, which on many is loopback (Debian's /etc/hosts): workers of other
machines then find nobody. The interface of the address by which Ray knows the node is right on all of them.
"""

import os
from typing import Any

import psutil
import ray
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class ByRaysNetwork(TorchConfig):
    """TorchConfig, for workers on any machines."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: BaseWorkerGroup, backend_config: Any) -> None:
        worker_group.execute(use_rays_interface)
        super().on_start(worker_group, backend_config)


def use_rays_interface() -> None:
    """In a worker, before it joins the group. What the node's owner has set stays."""
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if address in {one.address for one in addresses}:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
