"""Make `use_gpu`, `precision` and the loader definite for what the cluster has."""

import os

import ray
import ray.train
import torch

from pipelines.config.schema import Config


def resolve_devices(config: Config, here: bool = False) -> Config:
    """use_gpu and precision made definite for the cluster, or this process. ValueError where it has not enough."""
    workers = config.worker_range
    resources = {"CPU": 1, "GPU": torch.cuda.device_count()} if here else ray.cluster_resources()
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
        spare = use_gpu and not here and any(_has_only_cpus(node["Resources"]) for node in ray.nodes() if node["Alive"])
        data = data.model_copy(update={"loader": "ray" if spare else "torch"})
    elif data.loader == "ray" and not here and cpus <= workers[1]:
        raise ValueError(f"data.loader=ray: the cluster's {cpus:g} CPUs are all taken by workers={config.workers}")
    return config.model_copy(update={"use_gpu": use_gpu, "precision": precision, "data": data})


def _autoscaler_hint(config: Config) -> str:
    told = (
        f" after {config.wait_for_nodes} s" if config.wait_for_nodes else "; wait_for_nodes=SECONDS asks an autoscaler"
    )
    return told if "RAY_ADDRESS" in os.environ else ""


def _has_only_cpus(resources: dict[str, float]) -> bool:
    return "CPU" in resources and "GPU" not in resources
