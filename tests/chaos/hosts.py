"""Hosts that are namespaces of this machine: each with a network address, loopback, mounts and a cable of its own."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

BRIDGE, NET = "dmlbr", "10.213.7"
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


class Host:
    """number: of its address. hidden: folders that are empty here, whatever this machine has in them."""

    def __init__(self, number: int, hidden: Sequence[Path] = ()):
        self.name, self.cable, self.address = f"dml{number}", f"dmlv{number}", f"{NET}.{number}"
        self.hidden, self.process = hidden, None
        run("ip", "netns", "add", self.name)
        run("ip", "link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        run("ip", "link", "set", self.cable, "master", BRIDGE, "up")
        for command in (["addr", "add", f"{self.address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
            run("ip", "-n", self.name, *command)
        run("ip", "-n", self.name, "link", "set", "lo", "up")

    def start(self, arguments: list[str], log: Path) -> None:
        """Ray, until it is stopped."""
        mounts = [f"mount -t tmpfs none {folder}" for folder in self.hidden]
        inside = ["unshare", "--mount", "sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh"] if mounts else []
        given = os.environ | {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}  # see launch.start_local
        # A dead host is found as fast as cluster.yaml has it found.
        given |= {"RAY_health_check_failure_threshold": "3", "RAY_health_check_period_ms": "1000"}
        given |= {"RAY_health_check_initial_delay_ms": "3000", "RAY_health_check_timeout_ms": "3000"}
        with open(log, "wb") as file:
            command = [*self.shell, *inside, *RAY, f"--node-ip-address={self.address}", *arguments]
            self.process = psutil.Popen(command, env=given, stdout=file, stderr=file, start_new_session=True)

    @property
    def shell(self) -> list[str]:
        """What a command begins with that is typed here."""
        return ["ip", "netns", "exec", self.name]

    def processes(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)] if self.process else []

    def unplug(self) -> None:
        run("ip", "link", "set", self.cable, "down")

    def end(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(subprocess.CalledProcessError):
            run("ip", "link", "del", self.cable)
        run("ip", "netns", "del", self.name)


@contextlib.contextmanager
def hosts(hidden: Sequence[Sequence[Path]]) -> Iterator[tuple[str, list[Host]]]:
    """A Ray cluster: a head that trains nothing, whose address comes first in the list, and a host of one CPU for each
    entry of `hidden`, folders that it does not see. Yields Ray's address and head, *hosts."""
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    made: list[Host] = []
    try:
        run("ip", "addr", "add", f"{NET}.1/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        with tempfile.TemporaryDirectory(dir="/tmp", prefix="h") as folder:
            made.append(Host(10))
            head = ["--head", "--port=6399", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={folder}/0"]
            made[0].start(head, Path(folder, "head.log"))
            time.sleep(10)
            for number, folders in enumerate(hidden, 11):
                made.append(Host(number, folders))
                own = ["--address", f"{NET}.10:6399", "--num-cpus=1", f"--temp-dir={folder}/{number}"]
                made[-1].start(own, Path(folder, f"{number}.log"))
            yield f"{NET}.10:6399", made
    finally:
        for host in made:
            host.end()
        run("ip", "link", "del", BRIDGE)
