"""From a config to workers and back: Ray, progress, failures in words. Used by training and evaluation."""

import contextlib
import importlib
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

# Reports wait for the controller's next look at its workers: two seconds by default.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
# How long to wait for room for all workers before counting anew what there is room for: 60 by default.
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # after Ctrl-C a thread of Ray's would start a Ray of its own

import numpy as np
import pyarrow.fs
import ray
import ray.train
import torch
from ray.autoscaler.sdk import request_resources
from ray.train.torch import TorchTrainer
from rich.console import Console

from pipelines.config import Config
from pipelines.console import RunFailed, messages
from pipelines.network import ByRaysNetwork
from pipelines.progress import Bar, Board


@contextlib.contextmanager
def cluster(config: Config, logs: Path | None, cpus: int = 0, dashboard: bool = False) -> Iterator[None]:
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
        _await_nodes(config)
        yield
    finally:
        ray.shutdown()
        if logs is not None and not address and (session / "logs").is_dir():
            with contextlib.suppress(OSError):  # a full disk is told of by what failed on it, not by its logs
                shutil.copytree(session / "logs", logs, dirs_exist_ok=True, ignore=_unreadable)


def _await_nodes(config: Config) -> None:
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


def resolve_devices(config: Config, here: bool = False) -> Config:
    """use_gpu and precision made definite for the cluster, or this process. ValueError where it has not enough."""
    workers = config.worker_range
    resources = {"CPU": 1, "GPU": torch.cuda.device_count()} if here else ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), resources.get("CPU", 0)
    if config.use_gpu and gpus < workers[0]:
        raise ValueError(f"use_gpu=true: {workers[0]} workers need as many GPUs, the cluster has {gpus}{_hint(config)}")
    use_gpu = gpus >= workers[0] if config.use_gpu is None else config.use_gpu
    if cpus < workers[0]:
        raise ValueError(f"workers={config.workers}: each needs a CPU, the cluster has {cpus:g}{_hint(config)}")
    precision = config.precision or ("bf16" if use_gpu else "float32")
    data = config.data
    if data.loader == "auto":
        spare = use_gpu and not here and any(_has_only_cpus(node["Resources"]) for node in ray.nodes() if node["Alive"])
        data = data.model_copy(update={"loader": "ray" if spare else "torch"})
    elif data.loader == "ray" and not here and cpus <= workers[1]:
        raise ValueError(f"data.loader=ray: the cluster's {cpus:g} CPUs are all taken by workers={config.workers}")
    return config.model_copy(update={"use_gpu": use_gpu, "precision": precision, "data": data})


def _hint(config: Config) -> str:
    told = (
        f" after {config.wait_for_nodes} s" if config.wait_for_nodes else "; wait_for_nodes=SECONDS asks an autoscaler"
    )
    return told if "RAY_ADDRESS" in os.environ else ""


def _has_only_cpus(resources: dict[str, float]) -> bool:
    return "CPU" in resources and "GPU" not in resources


def run_here(
    loop: Callable[[dict[str, Any]], Any],
    config: Config,
    job: dict[str, Any],
    report: Callable[[dict[str, Any]], object] = dict,
) -> dict[str, float]:
    """Run a loop in this process, as Ray Train's only worker: without the seconds that processes take to start.

    report: called with what the loop reports, in Ray Train's place; by default nobody looks.
    """
    threads = torch.get_num_threads()
    settings = {"config": config.model_dump(exclude_none=True), "cpus": threads, "board": None, "report": report}
    trainer = TorchTrainer(
        loop, train_loop_config=job | settings, scaling_config=ray.train.ScalingConfig(num_workers=0)
    )
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    try:
        return trainer.fit().return_value  # type: ignore[attr-defined]
    except Exception as error:
        raise RunFailed(_reason(error)) from error
    finally:
        torch.set_num_threads(threads)


def run(
    loop: Callable[[dict[str, Any]], Any],
    config: Config,
    job: dict[str, Any],
    storage: str,
    name: str,
    console: Console,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> dict[str, float]:
    """Run a loop on config.workers workers, showing its progress; what rank 0 returns. RunFailed tells the cause."""
    low, high = config.worker_range
    nodes = len(ray.nodes())
    cores = os.cpu_count() or 1 if nodes == 1 else ray.cluster_resources()["CPU"]
    cpus = max(1, int(cores // high))
    failures = (3 if nodes > 1 else 0) if config.max_failures is None else config.max_failures
    per_worker = {"CPU": 1.0} | ({"GPU": 1.0} if config.use_gpu else {})
    # Where this process is: that node is lost last.
    here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}  # type: ignore[attr-defined]
    board = Board.options(label_selector=here).remote()  # type: ignore[attr-defined]
    settings = {"config": config.model_dump(exclude_none=True), "cpus": cpus, "board": board, "report": None}
    trainer = TorchTrainer(
        # Not as train_loop_config, which Ray shows on its page: the tracking server's address may hold a password.
        partial(
            _enter,
            (loop.__module__, loop.__qualname__),
            job | settings,
            storage == config.storage and f"{storage}/{name}/run.json",
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=low if low == high else (low, high),  # type: ignore[arg-type]
            use_gpu=bool(config.use_gpu),
            resources_per_worker=per_worker,
        ),
        torch_config=ByRaysNetwork(backend="nccl" if config.use_gpu else "gloo", timeout_s=config.timeout),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=failures),
            callbacks=list(callbacks),  # type: ignore[arg-type]
        ),
    )
    with Bar(board, console):
        try:
            return apart(trainer.fit).return_value
        except Exception as error:
            raise RunFailed(_reason(error)) from error


def apart(function: Callable[[], Any]) -> Any:
    """function() in a thread of its own, where Ray leaves Ctrl-C and SIGTERM to us: they raise KeyboardInterrupt here,
    and are not lost in a library's callback."""
    outcome: list[Any] = []
    asked = threading.Event()

    def call() -> None:
        try:
            outcome.extend((function(), None))
        except BaseException as error:  # handed to the caller's thread, which knows what to say
            outcome.extend((None, error))

    thread = threading.Thread(target=call, daemon=True)
    main = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {number: signal.signal(number, lambda *_: asked.set()) for number in signals}
    try:
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
            if asked.is_set():
                raise KeyboardInterrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _enter(loop: tuple[str, str], job: dict[str, Any], written: str | Literal[False]) -> Any:
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


def held(folder: Path, names: Sequence[str]) -> list[Any]:
    """Files of a folder in Ray's memory, for `unpacked` on any node: workers need not see our disk."""
    return [ray.put({name: np.fromfile(folder / name, np.uint8) for name in names})]


@contextlib.contextmanager
def unpacked(files: list[Any]) -> Iterator[Path]:
    """A folder with the files that are `held`, for the time of the block."""
    with scratch_storage() as folder:
        for name, content in ray.get(files[0]).items():
            content.tofile(Path(folder, name))
        yield Path(folder)


@contextlib.contextmanager
def scratch_storage() -> Iterator[str]:
    """A place for what Ray Train wants to write when nothing is to be kept."""
    with tempfile.TemporaryDirectory(prefix="dml-") as folder:
        yield folder


def _reason(error: BaseException) -> str:
    """One line that names the first cause."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        causes = [_root(e) for e in failures.values()]
        # When one worker fails, the others fail waiting for it: theirs is not the reason.
        error = next((c for c in causes if "Connection closed by peer" not in str(c)), causes[0])
    error = _root(error)
    if "Unable to set up cluster storage" in str(error):  # Ray Train's own look, on each node that has a worker
        return "storage: a node does not see the run's folder, which all nodes must share"
    lines = str(error).strip().splitlines() or [""]
    # What another process raised comes as its traceback, whose last line is the message.
    foreign = isinstance(error, ray.exceptions.RayError) or "DataLoader worker" in lines[0]
    return lines[-1] if foreign else f"{type(error).__name__}: {lines[0]}"


def _root(error: BaseException) -> BaseException:
    for attribute in ("_base_exc", "controller_failure", "cause", "__cause__"):
        inner = getattr(error, attribute, None)
        if isinstance(inner, BaseException):
            return _root(inner)
    return error


def _unreadable(folder: str, names: list[str]) -> list[str]:
    """Sockets and links to what is gone."""
    paths = {name: Path(folder, name) for name in names}
    return [name for name, path in paths.items() if not path.is_file() and not path.is_dir()]
