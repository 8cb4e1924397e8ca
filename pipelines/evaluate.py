"""Retrieval metrics of a learner on a retrieval task, sharded over the workers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import Tensor

from dml_core.data.datasets import LabelledImages, Retrieval
from dml_core.data.loading import Views
from dml_core.data.sampling import blocks
from dml_core.gather import rank, world_size
from dml_core.learner import Learner
from dml_core.retrieval.metrics import sharded_retrieval_metrics
from dml_core.retrieval.neighbors import block_rows
from pipelines import build, checkpoint, features
from pipelines.config import Config
from pipelines.progress import Reporter
from pipelines.recipe import parse

Outputs = Callable[[Tensor], dict[str, Tensor]]


class Sources:
    """Where batches of a set come from: decoded pictures or, with a frozen backbone, its cached features."""

    def __init__(
        self, config: Config, learner: Learner, device: torch.device, cpus: float, writes: bool, progress: Reporter
    ):
        self.config, self.learner, self.device, self.writes, self.progress = config, learner, device, writes, progress
        spare = max(0, int(cpus) - 1) if config.data.name != "glyphs" else 0
        asked = config.data.loader_processes
        self.processes = min(8, spare) if asked is None else asked
        self.cache: dict[int, Views | features.Features] = {}

    def of(self, images: LabelledImages) -> Views | features.Features:
        if not self.config.backbone.frozen:
            return build.views(self.config, images)
        if id(images) not in self.cache:
            views = build.views(self.config, images)

            def note(done: int, of: int) -> None:
                self.progress.note("features", done, of)

            self.cache[id(images)] = features.cached(
                self.config, self.learner, views, build.cache_folder(), self.device, self.writes, self.processes, note
            )
        return self.cache[id(images)]


def run(task: Retrieval, sources: Sources, stage: str, outputs: Outputs) -> dict[str, float]:
    """{"PREFIX/recall_at_1": ...} for each prefix that `outputs` gives embeddings (b, D) for."""
    query = _embed(task.query, sources, stage, outputs)
    gallery = _embed(task.gallery, sources, stage, outputs) if task.gallery else None
    metrics: dict[str, float] = {}
    for prefix in query:
        found = sharded_retrieval_metrics(
            query[prefix],
            torch.from_numpy(task.query.labels).to(sources.device),
            gallery[prefix] if gallery else None,
            torch.from_numpy(task.gallery.labels).to(sources.device) if task.gallery else None,
        )
        metrics |= {f"{prefix}/{name}": float(value) for name, value in found.items()}
    return metrics


@torch.inference_mode()
def _embed(images: LabelledImages, sources: Sources, stage: str, outputs: Outputs) -> dict[str, Tensor]:
    """This rank's blocks of the embeddings of a set, one under the other."""
    size = block_rows(len(images))
    rows = list(blocks(len(images), size, rank(), world_size(), features.BATCH[sources.device.type]))
    parts, done = [], 0
    for batch in sources.of(images).batches(rows, sources.processes):
        done += len(batch) * world_size()
        with torch.autocast(sources.device.type, torch.bfloat16, enabled=sources.config.precision == "bf16"):
            parts.append(outputs(batch.to(sources.device)))
        sources.progress.note(stage, min(len(images), done), len(images))
    if not parts:  # fewer blocks than ranks: this one has none, but knows the widths
        sample = next(iter(sources.of(images).batches([[(0, None)]])))
        parts.append({name: rows[:0] for name, rows in outputs(sample.to(sources.device)).items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def evaluate_loop(job: dict[str, Any]) -> dict[str, float]:
    """Test metrics of a checkpoint, as one worker of several.

    job: config (a dict), checkpoint (a folder that every worker sees), cpus, board.
    """
    config, folder = parse(job["config"]), Path(job["checkpoint"])
    device, context = ray.train.torch.get_device(), ray.train.get_context()
    torch.set_num_threads(max(1, int(job["cpus"])))
    learner = build.learner(config, len(checkpoint.read_class_names(folder)), read_weights=False)
    checkpoint.load_weights(folder, learner)
    learner.to(device, torch.float64 if config.precision == "float64" else torch.float32).eval()
    progress = Reporter(job["board"] if rank() == 0 else None)
    sources = Sources(config, learner, device, job["cpus"], context.get_local_rank() == 0, progress)
    splits = build.splits(config)
    return run(splits.test, sources, "test", lambda x: {"test": learner.embed(x)})
