"""Connect to a Ray cluster, or start a Ray of this process's own."""

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import ray
import ray.train
from ray.autoscaler.sdk import request_resources

from pipelines.config.schema import Config
from pipelines.console import messages


@contextlib.contextmanager
def open_cluster(config: Config, logs: Path | None, cpus: int = 0, dashboard: bool = False) -> Iterator[None]:
    """The Ray of RAY_ADDRESS or of this process, or a local one for the time of the block.

    logs: where the full logs of a local Ray go.  cpus, dashboard: what it has at least.  A Ray that was there before is
    left running.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            # At least one CPU a worker in Ray's books, so that any number of workers fits on any machine; and as many
            # as there are for decoding, which would wait for those of the workers for ever.
            cpus = max(os.cpu_count() or 1, config.worker_range[1], cpus)
            if config.data.loader == "ray":
                cpus += os.cpu_count() or 1
            start_local(cpus, dashboard)
    except ConnectionError as error:
        raise ValueError(f"RAY_ADDRESS={address}: no Ray cluster answers ({str(error).splitlines()[0]})") from None
    session = Path(ray._private.worker._global_node.get_session_dir_path())  # type: ignore[attr-defined]
    try:
        _wait_for_nodes(config)
        yield
    finally:
        ray.shutdown()
        if logs is not None and not address and (session / "logs").is_dir():
            with contextlib.suppress(OSError):  # a full disk is told of by what failed on it, not by its logs
                shutil.copytree(session / "logs", logs, dirs_exist_ok=True, ignore=_sockets_and_dead_links)


def _wait_for_nodes(config: Config) -> None:
    """Until the cluster has what the least number of workers needs, `wait_for_nodes` seconds at most."""
    need = {"CPU": 1} | ({"GPU": 1} if config.use_gpu else {})
    few, many = config.worker_range
    deadline = time.monotonic() + config.wait_for_nodes

    def missing() -> bool:
        has = ray.cluster_resources()
        return any(has.get(name, 0) < few for name in need)

    if config.wait_for_nodes and missing():
        messages.print(f"waiting for nodes, {config.wait_for_nodes} s at most: workers={config.workers}, each {need}")
        request_resources(bundles=[need] * many)
        while missing() and time.monotonic() < deadline:
            time.sleep(1)
        request_resources(bundles=[])  # from here on Ray Train asks for what it needs


def start_local(cpus: int, dashboard: bool = False) -> None:
    """A Ray of this process's own."""
    # Ray Train's PlacementGroupCleaner asks the newest Ray on the machine whether the controller lives, takes another
    # Ray's "unknown" for its death, and ends the training. An address where nothing answers makes it wait instead.
    inherited = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}  # nobody takes a local node away
    if not dashboard:
        inherited["RAY_API_SERVER_ADDRESS"] = "http://127.0.0.1:9"
    before = {key: os.environ.get(key) for key in inherited}
    os.environ.update(inherited)  # for the processes that init starts
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=dashboard,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    finally:
        for key, value in before.items():
            os.environ.pop(key)
            if value is not None:
                os.environ[key] = value


def _sockets_and_dead_links(folder: str, names: list[str]) -> list[str]:
    """Sockets and links to what is gone."""
    paths = {name: Path(folder, name) for name in names}
    return [name for name, path in paths.items() if not path.is_file() and not path.is_dir()]
