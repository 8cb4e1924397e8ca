"""Retrieval metrics of a learner on a retrieval task, sharded over the workers."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor

from dml_core.data.datasets import LabelledImages, Retrieval, Splits
from dml_core.data.loading import Views
from dml_core.data.sampling import Rows, blocks, one_of_each_class
from dml_core.gather import rank, world_size
from dml_core.learner import Learner
from dml_core.retrieval.metrics import sharded_retrieval_metrics
from dml_core.retrieval.neighbors import block_rows
from pipelines import build, checkpoint, features, launch
from pipelines.config import Config
from pipelines.progress import Reporter
from pipelines.recipe import parse
from pipelines.streaming import StreamedViews

Source = Views | StreamedViews | features.Features
Outputs = Callable[[Tensor], dict[str, Tensor]]


class Sources:
    """Where batches of a set come from: decoded pictures or, with a frozen backbone, its cached features."""

    def __init__(self, config: Config, learner: Learner, device: torch.device, cpus: float, progress: Reporter):
        self.config, self.learner, self.device, self.progress = config, learner, device, progress
        # Who writes to its node's disk. Ray Train itself would say so to its own workers, not in a trial of Ray Tune.
        self.writes = int(os.environ.get("LOCAL_RANK", 0)) == 0
        spare = max(0, int(cpus) - 1) if config.data.name != "glyphs" else 0
        asked = config.data.loader_processes
        self.processes = min(8, spare) if asked is None else asked
        self.files: dict[int, Path] = {}  # features of a whole set, whose parts are asked for
        self.cpus = max(1, int(cpus))
        self.threads = ThreadPoolExecutor(self.cpus) if self.cpus > 1 and device.type == "cpu" else None

    def each(self, function: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[Any]:
        """map in the run's precision, on as many CPUs as this worker has."""
        amp = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")
        return (self.threads.map if self.threads else map)(amp(function), *arguments)

    def of(self, images: LabelledImages) -> Source:
        if not self.config.backbone.frozen:
            return self.views(images)
        whole = images.whole or images
        if id(whole) not in self.files:
            views = self.views(whole)

            def note(done: int, of: int) -> None:
                self.progress.note("features", done, of)

            torch.set_num_threads(self.cpus)
            self.files[id(whole)] = features.cached(
                self.config, self.learner, views, build.cache_folder(), self.device, self.writes, self.processes, note
            )
            torch.set_num_threads(1)
        return features.Features(self.files[id(whole)], images.places)

    def views(self, images: LabelledImages) -> Views | StreamedViews:
        views = build.views(self.config, images)
        return StreamedViews(views) if self.config.data.loader == "ray" and images.files else views


def device(config: Config) -> torch.device:
    """Of this worker."""
    if not config.use_gpu:
        return torch.device("cpu")
    return ray.train.torch.get_device() if dist.is_initialized() else torch.device("cuda")


def learned(learner: Learner, task: Retrieval, sources: Sources, stage: str, prefix: str) -> dict[str, float]:
    """{"PREFIX/recall_at_1": ...}; with NAMR also those of PREFIX_rerank/ (its top ordered anew by adaptive distance)
    and PREFIX_exact/ (the whole gallery searched by it)."""
    if (namr := sources.config.namr) is None:
        return run(task, sources, stage, lambda x: {prefix: learner.embed(x)})

    def outputs(x: Tensor) -> dict[str, Tensor]:
        seen = learner.features(x)
        return {"embedding": learner.embed(seen), "structure": learner.structure(seen)}

    query, gallery = _both(task, sources, stage, outputs)
    z, s = query["embedding"], query["structure"]
    found = _prefixed(prefix, _metrics(task, z, gallery.get("embedding")))
    found |= _prefixed(f"{prefix}_rerank", _metrics(task, z, gallery.get("embedding"), s, namr.rerank))
    return found | _prefixed(f"{prefix}_exact", _metrics(task, z, gallery.get("embedding"), s))


def tested(learner: Learner, splits: Splits, sources: Sources) -> dict[str, float]:
    """Metrics of all tests."""
    metrics: dict[str, float] = {}
    for prefix, task in splits.tests.items():
        metrics |= learned(learner, task, sources, "test", prefix)
    return metrics


def run(task: Retrieval, sources: Sources, stage: str, outputs: Outputs) -> dict[str, float]:
    """{"PREFIX/recall_at_1": ...} for each prefix that `outputs` gives embeddings (b, D) for."""
    query, gallery = _both(task, sources, stage, outputs)
    metrics: dict[str, float] = {}
    for prefix in query:
        metrics |= _prefixed(prefix, _metrics(task, query[prefix], gallery.get(prefix)))
    return metrics


def _both(
    task: Retrieval, sources: Sources, stage: str, outputs: Outputs
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the queries, and of the gallery: empty where that is the queries themselves."""
    query = _embed(task.query, sources, stage, outputs)
    return query, _embed(task.gallery, sources, stage, outputs) if task.gallery else {}


def _metrics(
    task: Retrieval, query: Tensor, gallery: Tensor | None, structure: Tensor | None = None, rerank: int | None = None
) -> dict[str, float]:
    labels = torch.from_numpy(task.query.labels).to(query.device)
    targets = torch.from_numpy(task.gallery.labels).to(query.device) if task.gallery else None

    def found(in_gallery: Tensor | None = None) -> dict[str, float]:
        return sharded_retrieval_metrics(
            query, labels, gallery, targets, structure_shard=structure, rerank=rerank, in_gallery=in_gallery
        )

    if not task.draws:
        return found()
    draws = [found(torch.from_numpy(one_of_each_class(task.query.labels, seed))) for seed in range(task.draws)]
    return {name: sum(metrics[name] for metrics in draws) / task.draws for name in draws[0]}


def _prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": float(value) for name, value in metrics.items()}


@torch.inference_mode()
def stream(images: LabelledImages, sources: Sources, stage: str, outputs: Outputs) -> Iterator[dict[str, Tensor]]:
    """This rank's blocks of a set, batch after batch; `outputs` of each, and "sample" (b,), the places in the set."""
    size = block_rows(len(images))
    rows = list(blocks(len(images), size, rank(), world_size(), features.BATCH[sources.device.type]))
    batches, done = zip(sources.of(images).batches(rows, sources.processes), rows, strict=True), 0

    @torch.inference_mode()
    def found(batch: Tensor, samples: Rows) -> dict[str, Tensor]:
        return outputs(batch.to(sources.device)) | {"sample": torch.tensor([sample for sample, _ in samples])}

    while some := list(itertools.islice(batches, sources.cpus)):
        for part in sources.each(found, *zip(*some, strict=True)):
            done += len(part["sample"]) * world_size()
            yield part
        sources.progress.note(stage, min(len(images), done), len(images))


@torch.inference_mode()
def _embed(images: LabelledImages, sources: Sources, stage: str, outputs: Outputs) -> dict[str, Tensor]:
    """This rank's blocks of the embeddings of a set, one under the other."""
    parts = list(stream(images, sources, stage, outputs))
    if not parts:  # fewer blocks than ranks: this one has none, but knows the widths
        sample = next(iter(sources.of(images).batches([[(0, None)]])))
        parts.append({name: rows[:0] for name, rows in outputs(sample.to(sources.device)).items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "sample"}


def of_checkpoint(job: dict[str, Any]) -> Sources:
    """A checkpoint's learner, as one worker of several has it. job: as of evaluate_loop."""
    config = parse(job["config"])
    torch.set_num_threads(1)
    with launch.unpacked(job["checkpoint"]) as folder:
        learner = build.learner(config, len(checkpoint.read_class_names(folder)), read_weights=False)
        checkpoint.load_weights(folder, learner)
    learner.to(device(config), torch.float64 if config.precision == "float64" else torch.float32).eval()
    progress = Reporter(job["board"] if rank() == 0 else None)
    return Sources(config, learner, device(config), job["cpus"], progress)


def evaluate_loop(job: dict[str, Any]) -> dict[str, float]:
    """Test metrics of a checkpoint, as one worker of several.

    job: config (a dict), checkpoint (launch.held), unreadable (pictures to leave out), cpus, board.
    """
    sources = of_checkpoint(job)
    return tested(sources.learner, build.splits(sources.config, job["unreadable"]), sources)
