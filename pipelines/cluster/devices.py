"""Whether a run takes Ray, and `use_gpu`, `precision` and the loader made definite for what the cluster has."""

import os
import sys

from pipelines.config.schema import Config


def needs_ray(config: Config) -> bool:
    """Whether a run takes more than this process: a cluster, several workers, tasks that decode, or another attempt."""
    return has_cluster() or config.worker_range[1] > 1 or config.data.loader == "ray" or bool(config.max_failures)


def has_cluster() -> bool:
    """Whether there is a Ray to use: that of RAY_ADDRESS, or one that this process has started or joined."""
    ray = sys.modules.get("ray")
    return "RAY_ADDRESS" in os.environ or (ray is not None and ray.is_initialized())


def resolve_devices(config: Config, here: bool = False) -> Config:
    """Make `use_gpu`, `precision` and `data.loader` definite.

    Args:
        config: As the user wrote it.
        here: For this process alone, not for the cluster.

    Raises:
        ValueError: The cluster has not enough CPUs or GPUs.
    """
    workers = config.worker_range
    resources = _resources_here() if here else _cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), resources.get("CPU", 0)
    if config.use_gpu and gpus < workers[0]:
        raise ValueError(
            f"use_gpu=true: {workers[0]} workers need as many GPUs, the cluster has {gpus}{_autoscaler_hint(config)}"
        )
    use_gpu = gpus >= workers[0] if config.use_gpu is None else config.use_gpu
    if cpus < workers[0]:
        raise ValueError(
            f"workers={config.workers}: each needs a CPU, the cluster has {cpus:g}{_autoscaler_hint(config)}"
        )
    precision = config.precision or ("bf16" if use_gpu else "float32")
    data = config.data
    if data.loader == "auto":
        can_stream = data.name != "glyphs" and data.loader_processes is None
        cluster = use_gpu and not here and can_stream
        spare = cluster and _has_nodes_without_gpu()
        data = data.model_copy(update={"loader": "ray" if spare else "torch"})
    elif data.loader == "ray" and not here and cpus <= workers[1]:
        raise ValueError(f"data.loader=ray: the cluster's {cpus:g} CPUs are all taken by workers={config.workers}")
    return config.model_copy(update={"use_gpu": use_gpu, "precision": precision, "data": data})


def _resources_here() -> dict[str, float]:
    import torch  # a second of import, which a driver of other processes does without

    return {"CPU": 1, "GPU": torch.cuda.device_count()}


def _cluster_resources() -> dict[str, float]:
    import ray

    return ray.cluster_resources()


def _autoscaler_hint(config: Config) -> str:
    if "RAY_ADDRESS" not in os.environ:
        return ""
    if config.wait_for_nodes:
        return f" after {config.wait_for_nodes} s"
    return "; wait_for_nodes=SECONDS asks an autoscaler"


def _has_nodes_without_gpu() -> bool:
    import ray

    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return any("CPU" in node and "GPU" not in node for node in resources)
