"""Have workers talk to each other by the network that Ray talks to them.

Gloo listens where the machine's own name leads, which on many is loopback (Debian's /etc/hosts): workers of other
machines then find nobody. The interface of the address by which Ray knows the node is right on all of them.
"""

import os
from typing import Any

import psutil
import ray
from ray.train.backend import Backend, BackendConfig
from ray.train.torch import TorchConfig


class NodeNetworkConfig(TorchConfig):
    """Ray Train's TorchConfig for workers on any machines: gloo uses the interface of the node's address in Ray."""

    @property
    def backend_cls(self) -> type[Backend]:
        torch_backend: Any = super().backend_cls

        class NodeNetworkBackend(torch_backend):
            def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
                # A worker_process_setup_hook would be the public way, but Ray takes one for whole jobs only.
                worker_group.execute(choose_interface)
                super().on_start(worker_group, backend_config)

        return NodeNetworkBackend


def choose_interface() -> None:
    """Set GLOO_SOCKET_IFNAME in a worker, before it joins the group. What the node's owner has set stays."""
    node_address = ray.util.get_node_ip_address()
    for interface, addresses in psutil.net_if_addrs().items():
        if node_address in {entry.address for entry in addresses}:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
