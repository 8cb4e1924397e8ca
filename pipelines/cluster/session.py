"""Connect to a Ray cluster, or start a Ray of this process's own."""

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources

from dml_core.cpus import usable_cpus
from pipelines.cluster.address import cluster_address, no_cluster, require_cluster
from pipelines.config.schema import Config
from pipelines.console import RunFailed, messages

# Of the processes of a Ray that this process starts.
LOCAL_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes a local node away
    "RAY_prestart_worker_first_driver": "0",  # of processes that Ray Train's actors, with their variables, cannot use
    "RAY_worker_niceness": "0",  # by default 15, and all workers wait for one that gives way to some daemon
    "REPORTER_UPDATE_INTERVAL_MS": "60000",  # of the statistics of a dashboard that nobody looks at
    # A step frees what the next one takes again: glibc keeps it, and the kernel need not clear it each time.
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
}
# Ray Train's PlacementGroupCleaner asks the newest Ray on the machine whether the controller lives, takes another
# Ray's "unknown" for its death, and ends the training. An address where nothing answers makes it wait instead.
API_SERVER, NOBODY = "RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9"


@contextlib.contextmanager
def open_cluster(config: Config, logs: Path | None, cpus: int = 0, dashboard: bool = False) -> Iterator[None]:
    """Use the Ray of this process or of RAY_ADDRESS, or a local one for the time of the block.

    A Ray that was there before is left running.

    Args:
        config: Tells how many workers there must be room for, and how long to wait for nodes.
        logs: Folder for the full logs of a local Ray; None: they go with it.
        cpus: Least CPUs in the books of a local Ray.
        dashboard: Whether a local Ray has one.

    Raises:
        ValueError: No cluster answers at RAY_ADDRESS.
    """
    if ray.is_initialized():
        yield
        return
    require_cluster()
    address, session = cluster_address(), None
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            # At least one CPU a worker in Ray's books, so that any number of workers fits on any machine; and as many
            # as there are for decoding, which would wait for those of the workers for ever.
            cpus = max(usable_cpus(), config.worker_range[1], cpus)
            if config.data.loader == "ray":
                cpus += usable_cpus()
            session = start_local(cpus, dashboard)
    except (ConnectionError, RuntimeError) as error:  # RuntimeError: it runs another version of Ray or of Python
        raise no_cluster(str(address), " ".join(str(error).split())) from None
    try:
        _wait_for_nodes(config)
        yield
    finally:
        ray.shutdown()
        if logs is not None and session is not None and (session / "logs").is_dir():
            with contextlib.suppress(OSError):  # a full disk is told of by what failed on it, not by its logs
                shutil.copytree(session / "logs", logs, dirs_exist_ok=True, ignore=_sockets_and_dead_links)


def _wait_for_nodes(config: Config) -> None:
    """Wait until the cluster has what the fewest workers need, `wait_for_nodes` seconds at most."""
    per_worker = {"CPU": 1} | ({"GPU": config.gpus_per_worker} if config.use_gpu else {})
    fewest, most = config.worker_range
    deadline = time.monotonic() + config.wait_for_nodes

    def missing() -> bool:
        has = ray.cluster_resources()
        return any(has.get(name, 0) < fewest * amount for name, amount in per_worker.items())

    if config.wait_for_nodes and missing():
        wanted = f"workers={config.workers}, each {per_worker}"
        messages.print(f"waiting for nodes, {config.wait_for_nodes} s at most: {wanted}")
        request_resources(bundles=[per_worker] * most)
        while missing() and time.monotonic() < deadline:
            time.sleep(1)
        request_resources(bundles=[])  # from here on Ray Train asks for what it needs


def start_local(cpus: int, dashboard: bool = False) -> Path:
    """Start a Ray of this process's own, with so many CPUs in its books. Return its session's folder.

    Raises:
        RunFailed: It did not start in time.
    """
    before = {key: os.environ.get(key) for key in (*LOCAL_ENVIRONMENT, API_SERVER)}
    os.environ.update(LOCAL_ENVIRONMENT)  # for the processes that init starts
    if not dashboard:
        os.environ[API_SERVER] = NOBODY
    try:
        context: Any = ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=dashboard,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # Ray raises no type of its own where the machine is too busy to start one in time
        raise RunFailed(
            f"Ray did not start: {(str(error).splitlines() or [type(error).__name__])[0]}", goes_on=True
        ) from error
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
    return Path(context.address_info["session_dir"])


def _sockets_and_dead_links(folder: str, names: list[str]) -> list[str]:
    """Return the names that cannot be copied."""
    paths = {name: Path(folder, name) for name in names}
    return [name for name, path in paths.items() if not path.is_file() and not path.is_dir()]
