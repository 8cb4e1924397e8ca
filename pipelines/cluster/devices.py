"""What a run computes on: workers, GPUs or CPUs, precision and loader, made definite for what there is."""

import ctypes
import sys
from pathlib import Path
from typing import NamedTuple

import psutil
from rich.console import Console

from dml_core.cpus import usable_cpus
from pipelines.cluster.address import cluster_address
from pipelines.config.schema import AUTO, Config

# Bytes of a worker on CPUs: torch, its libraries, pictures and activations of a small network.
WORKER_MEMORY = 2 * 2**30


class Resources(NamedTuple):
    """What this machine or the cluster has; `memory` in bytes."""

    gpus: int
    cpus: int
    memory: float


def needs_ray(config: Config) -> bool:
    """Whether a run takes more than this process: a cluster, several workers, tasks that decode, or another attempt."""
    return has_cluster() or config.worker_range[1] > 1 or config.data.loader == "ray" or bool(config.max_failures)


def has_cluster() -> bool:
    """Whether there is a Ray to use: that of RAY_ADDRESS, or one that this process has started or joined."""
    ray = sys.modules.get("ray")
    return cluster_address() is not None or (ray is not None and ray.is_initialized())


def resolve_workers(config: Config, trains: bool = True, here: bool = False) -> tuple[Config, str]:
    """Make `workers=auto` a number.

    On GPUs there is one worker each. On CPUs there are as many as training gets faster with: no more than slices, as
    each takes whole ones, CPUs, and workers that the memory has room for. Work without gradients, and a frozen
    backbone, use all CPUs of a machine from one process.

    Args:
        config: As the user wrote it. A cluster, if there is one, is connected already.
        trains: Whether there is a training, not the use of a trained model.
        here: This process is to be the only one.

    Returns:
        The config, and why it is that number, in words; "" where the user wrote a number.
    """
    if config.workers != AUTO:
        return config, ""
    number, reason = 1, "as one process is asked for"
    if not here:
        has = resources_of_cluster() if has_cluster() else resources_here()
        number, reason = choose_workers(config, has, trains)
    return config.model_copy(update={"workers": number}), f" (auto: {reason})"


def choose_workers(config: Config, has: Resources, trains: bool) -> tuple[int, str]:
    """Return how many workers `workers=auto` is, and why."""
    if config.gpus_per_worker < 1:
        return 1, f"as gpus_per_worker={config.gpus_per_worker:g} is for one"
    if config.use_gpu or (config.use_gpu is None and has.gpus):
        slices = (config.batch.slices or config.batch.size) if trains else has.gpus
        if slices < has.gpus:
            return slices, f"one for each of batch.slices={slices}; there are {has.gpus} GPUs"
        return max(1, has.gpus), "one on each GPU"
    if not trains and not has_cluster():
        return 1, "which uses all CPUs"
    if config.backbone.frozen:
        return 1, "which computes the features of a frozen backbone on all CPUs"
    limits = {
        f"one for each of batch.slices={config.slices}": config.slices,
        f"as there {'are' if has.cpus > 1 else 'is'} {has.cpus} CPU{'s' * (has.cpus > 1)}": has.cpus,
        f"as each takes about {WORKER_MEMORY / 2**30:g} of {has.memory / 2**30:.1f} GiB": has.memory // WORKER_MEMORY,
    }
    reason = min(limits, key=lambda limit: limits[limit])
    fit = max(1, int(limits[reason]))
    longest = -(-config.slices // fit)  # the most slices of a worker, which the others wait for
    return -(-config.slices // longest), reason


def resolve_devices(config: Config, here: bool = False, console: Console | None = None) -> Config:
    """Make `use_gpu`, `precision` and `data.loader` definite.

    Args:
        config: With a number of workers.
        here: For this process alone, not for the cluster.
        console: Told of GPUs that are not used, and by which key they would be; None: nobody.

    Raises:
        ValueError: The cluster has not enough CPUs or GPUs.
    """
    workers = config.worker_range
    has = resources_here()._replace(cpus=1) if here else resources_of_cluster()
    if config.use_gpu and has.gpus < workers[0]:
        where = "this machine" if here else "the cluster"
        hint = _autoscaler_hint(config)
        raise ValueError(f"use_gpu=true: each of workers={config.workers} needs a GPU, {where} has {has.gpus}{hint}")
    use_gpu = has.gpus >= workers[0] if config.use_gpu is None else config.use_gpu
    if has.cpus < workers[0]:
        raise ValueError(
            f"workers={config.workers}: each needs a CPU, the cluster has {has.cpus}{_autoscaler_hint(config)}"
        )
    if config.data.decode == "gpu" and not use_gpu:
        raise ValueError("data.decode=gpu: this run uses no GPU (use_gpu); allowed: cpu")
    if console and (line := idle_gpus(config, has.gpus)):
        console.print(line, style="yellow", highlight=False)
    precision = config.precision or ("bf16" if use_gpu else "float32")
    data = config.data
    if data.loader == "auto":
        can_stream = data.name != "glyphs" and data.loader_processes is None and data.decode == "cpu"
        cluster = use_gpu and not here and can_stream
        spare = cluster and _has_nodes_without_gpu()
        data = data.model_copy(update={"loader": "ray" if spare else "torch"})
    elif data.loader == "ray" and not here and has.cpus <= workers[1]:
        raise ValueError(f"data.loader=ray: the cluster's {has.cpus} CPUs are all taken by workers={config.workers}")
    return config.model_copy(update={"use_gpu": use_gpu, "precision": precision, "data": data})


def describe_workers(config: Config, reason: str) -> str:
    """Return how many workers a run has, on what, and why: `reason` as of `resolve_workers`."""
    return f"workers={config.workers} on {'GPUs' if config.use_gpu else 'CPUs'}{reason}"


def idle_gpus(config: Config, gpus: int) -> str | None:
    """Return a line on GPUs that a run does not use, and the key that would use them; None where there are none."""
    fewest, most = config.worker_range
    if not gpus:
        return None
    there = f"{gpus} GPU{'s' * (gpus > 1)}"
    if config.use_gpu is False:
        return f"use_gpu=false: {there} not used; use_gpu=true uses {'them' if gpus > 1 else 'it'}"
    if gpus < fewest:
        return f"{there} not used: workers={config.workers} need one each; workers=auto uses what there is"
    slices = config.batch.slices
    if slices and slices <= most < gpus:
        return f"{gpus - most} of {there} not used: batch.slices={slices} allows no more workers"
    if most >= gpus:
        return None
    share = config.gpus_per_worker
    key = f"workers={gpus}" if share == 1 else f"gpus_per_worker=1 workers={gpus}"  # a share is for one worker
    return f"{gpus - most} of {there} not used: {key} uses all"


def resources_here() -> Resources:
    """Return what this machine has. torch, which takes seconds to import, is asked for GPUs where there is a driver."""
    gpus = 0
    if "torch" in sys.modules or _has_gpu_driver():
        import torch

        gpus = torch.cuda.device_count()
    return Resources(gpus, usable_cpus(), psutil.virtual_memory().available)


def _has_gpu_driver() -> bool:
    if sys.platform != "linux" or Path("/dev/kfd").exists():  # AMD's
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def resources_of_cluster() -> Resources:
    """Return what all nodes of the connected Ray have."""
    import ray

    has = ray.cluster_resources()
    return Resources(int(has.get("GPU", 0)), int(has.get("CPU", 0)), has.get("memory", 0))


def _autoscaler_hint(config: Config) -> str:
    if cluster_address() is None:
        return ""
    if config.wait_for_nodes:
        return f" after {config.wait_for_nodes} s"
    return "; wait_for_nodes=SECONDS asks an autoscaler"


def _has_nodes_without_gpu() -> bool:
    import ray

    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return any("CPU" in node and "GPU" not in node for node in resources)
