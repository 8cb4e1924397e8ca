"""Machines that can be lost: a Ray cluster whose nodes are processes of this machine, and `dml train` on it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from ray._private.node import Node
from ray.cluster_utils import Cluster


class Machines:
    """A head without CPUs for training, and nodes of `cpus` each."""

    def __init__(self, nodes: int, cpus: int = 1):
        # See launch.start_local: processes of this cluster ask no other Ray on this machine about each other.
        os.environ["RAY_API_SERVER_ADDRESS"] = "http://127.0.0.1:9"
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes = list[Node]()
        for _ in range(nodes):
            self.add(cpus)

    @property
    def address(self) -> str:
        return self.cluster.address

    def add(self, cpus: int = 1) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=cpus))

    def lose(self, node: Node) -> None:
        """As a machine that loses power."""
        lost = psutil.Process(raylet(node))
        for process in [lost, *lost.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)

    def announce(self, node: Node, seconds: int) -> None:
        """That a machine will be taken away, as a cloud says of a spot instance."""
        command = ["drain-node", "--address", self.address, "--node-id", node.node_id, "--reason-message", "test"]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", str(seconds)]
        subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *command], check=True, capture_output=True)

    def workers(self, node: Node) -> list[psutil.Process]:
        """Training workers on a node."""
        below = psutil.Process(raylet(node)).children(recursive=True)
        return [p for p in below if "RayTrainWorker" in "".join(quietly(p.cmdline))]

    def all_workers(self) -> set[int]:
        return {worker.pid for node in self.nodes for worker in self.workers(node)}

    def processes(self) -> list[psutil.Process]:
        """All that belong to the cluster."""
        roots = [psutil.Process(raylet(node)) for node in [self.cluster.head_node, *self.nodes]]
        return [process for root in roots for process in [root, *root.children(recursive=True)]]

    def stop(self) -> None:
        self.cluster.shutdown()
        del os.environ["RAY_API_SERVER_ADDRESS"]


def raylet(node: Node) -> int:
    return node.all_processes["raylet"][0].process.pid


def quietly(function: Any) -> list[str]:
    try:
        return function()
    except psutil.Error:
        return []


def nothing_left(pids: set[int], seconds: float = 30.0) -> None:
    """None of the processes, all of Ray's, is alive."""
    there = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(there, timeout=seconds)
    assert not alive, alive


class Training:
    """`dml train` on a cluster, as a user starts it from a folder of their own."""

    def __init__(self, folder: Path, address: str, arguments: list[str], shell: Sequence[str] = ()):
        """shell: what the command begins with, to be typed elsewhere."""
        self.given = folder, address, arguments, shell
        self.log, self.out = folder / "log", folder / "out"
        command = [*shell, sys.executable, "-m", "pipelines.cli", "train", *arguments, "--json"]
        with open(self.log, "ab") as log, open(self.out, "wb") as out:
            given = os.environ | {"RAY_ADDRESS": address}
            self.process = subprocess.Popen(
                command, cwd=folder, env=given, stdout=out, stderr=log, start_new_session=True
            )

    def again(self) -> "Training":
        return Training(*self.given)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait_for(self, what: Any, seconds: float = 240.0) -> None:
        """Until what() is true of the run under way."""
        deadline = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.05)

    def read_job(self, seconds: float) -> None:
        assert self.process.wait(seconds) == 0, self.log.read_text()[-3000:]


@contextlib.contextmanager
def machines(nodes: int, cpus: int = 1) -> Iterator[Machines]:
    made = Machines(nodes, cpus)
    try:
        yield made
    finally:
        made.stop()
