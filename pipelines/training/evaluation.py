"""Retrieval metrics of a learner on a retrieval task, sharded over the workers."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dml_core.data.datasets import LabelledImages, Retrieval, Splits
from dml_core.data.sampling import Rows, blocks, one_of_each_class
from dml_core.gather import rank, world_size
from dml_core.learner import Learner
from dml_core.retrieval.metrics import sharded_clustering_metrics
from dml_core.retrieval.neighbors import block_rows
from dml_core.retrieval.ranked import RankedQueries, rank_queries
from dml_core.retrieval.scores import CLUSTERING, FULL_LIST, KS
from dml_core.retrieval.task import Task, make_task
from pipelines.cluster.progress import Reporter
from pipelines.cluster.transfer import received_files
from pipelines.cluster.worker import device_of_worker
from pipelines.data.features import BATCH
from pipelines.data.sets import identify, load_tests
from pipelines.data.sources import Sources
from pipelines.models.build import build_embedder
from pipelines.training.job import Evaluated, EvaluationJob, ModelJob
from pipelines.training.passes import prepare_passes
from pipelines.training.query_rows import NEIGHBORS, write_queries

Outputs = Callable[[Tensor], dict[str, Tensor]]
See = Callable[[RankedQueries], object]


def retrieval_of_learner(
    learner: Learner, task: Retrieval, sources: Sources, stage: str, prefix: str, see: See | None = None
) -> dict[str, float]:
    """Measure how well a learner retrieves on a task.

    Args:
        learner: In evaluation mode.
        task: Queries and, where they do not search among themselves, a gallery.
        sources: Where batches come from.
        stage: Of the work, for the progress.
        prefix: Of the metrics' names.
        see: Called with the queries of this rank as cosine ranks the gallery for them.

    Returns:
        {"PREFIX/recall_at_1": ...}; with NAMR also PREFIX_rerank/* (the top of each ranking ordered anew by adaptive
        distance) and PREFIX_exact/* (the whole gallery searched by it).
    """
    extra = sources.config.extra_metrics
    if (namr := sources.config.namr) is None:
        return retrieval_of(task, sources, stage, lambda x: {prefix: learner.embed(x)}, extra, see)

    def outputs(x: Tensor) -> dict[str, Tensor]:
        features = learner.features(x)
        return {"embedding": learner.embed(features), "structure": learner.structure(features)}

    query, gallery = _embed_task(task, sources, stage, outputs)
    z, s = query["embedding"], query["structure"]
    metrics = _prefixed(prefix, _metrics(task, z, gallery.get("embedding"), extra, see=see))
    metrics |= _prefixed(f"{prefix}_rerank", _metrics(task, z, gallery.get("embedding"), extra, s, namr.rerank))
    return metrics | _prefixed(f"{prefix}_exact", _metrics(task, z, gallery.get("embedding"), extra, s))


def test_metrics(
    learner: Learner, tests: Mapping[str, Retrieval], sources: Sources, see: See | None = None
) -> dict[str, float]:
    """Return test*/* metrics of all of a set's tests. see: as of retrieval_of_learner, for the first test alone."""
    metrics: dict[str, float] = {}
    for prefix, task in tests.items():
        first = see if prefix == "test" else None
        metrics |= retrieval_of_learner(learner, task, sources, "test", prefix, first)
        metrics[f"{prefix}/queries"] = float(len(task.query))
    return metrics


def retrieval_of(
    task: Retrieval,
    sources: Sources,
    stage: str,
    outputs: Outputs,
    extra: Sequence[str] = (),
    see: See | None = None,
) -> dict[str, float]:
    """Measure how well several embeddings retrieve on a task.

    Args:
        task: Queries and, where they do not search among themselves, a gallery.
        sources: Where batches come from.
        stage: Of the work, for the progress.
        outputs: Images or features to embeddings (b, D), by the prefix of their metrics' names.
        extra: Further metrics, see dml_core/retrieval/scores.py.
        see: As of retrieval_of_learner.

    Returns:
        {"PREFIX/recall_at_1": ...} for each prefix.
    """
    query, gallery = _embed_task(task, sources, stage, outputs)
    metrics: dict[str, float] = {}
    for prefix in query:
        metrics |= _prefixed(prefix, _metrics(task, query[prefix], gallery.get(prefix), extra, see=see))
    return metrics


def _embed_task(
    task: Retrieval, sources: Sources, stage: str, outputs: Outputs
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Embed this rank's blocks of the queries, and of the gallery: nothing where that is the queries themselves."""
    query = _embed(task.query, sources, stage, outputs)
    return query, _embed(task.gallery, sources, stage, outputs) if task.gallery else {}


def _metrics(
    task: Retrieval,
    query: Tensor,
    gallery: Tensor | None,
    extra: Sequence[str] = (),
    structure: Tensor | None = None,
    rerank: int | None = None,
    see: See | None = None,
) -> dict[str, float]:
    """Return retrieval metrics of this rank's rows; with drawn galleries their means over the draws.

    Of `extra`, those of the whole ranking have no meaning where only the top is ordered anew, and clusters know no
    order of a gallery.
    """
    ranking = [name for name in extra if name not in CLUSTERING and not (rerank and name in FULL_LIST)]

    def measure(in_gallery: Tensor | None = None) -> dict[str, float]:
        labels = labels_of(task, query.device, in_gallery)
        ranked = rank_queries(labels, query, gallery, KS, ranking, structure, rerank, NEIGHBORS if see else 1)
        if see:
            see(ranked)
        return ranked.means()

    if task.draws:
        draws = [measure(torch.from_numpy(one_of_each_class(task.query.labels, seed))) for seed in range(task.draws)]
        metrics = {name: sum(draw[name] for draw in draws) / task.draws for name in draws[0]}
    else:
        metrics = measure()
    clustering = [name for name in extra if name in CLUSTERING and structure is None]
    if clustering:
        clusters = sharded_clustering_metrics(query, torch.from_numpy(task.query.labels))
        metrics |= {name: clusters[name] for name in clustering}
    return metrics


def labels_of(task: Retrieval, device: torch.device, in_gallery: Tensor | None = None) -> Task:
    """Return a task's labels on a device, and what is left out of each query's ranking.

    in_gallery: (N,) bool, where the gallery is drawn of the task's samples.
    """
    query, gallery = task.query, task.gallery
    positions = task.query_positions()

    def tensor(numbers: np.ndarray | None) -> Tensor | None:
        return None if numbers is None else torch.from_numpy(numbers)

    return make_task(
        torch.from_numpy(query.labels),
        tensor(gallery.labels if gallery else None),
        device,
        tensor(query.cameras),
        tensor(gallery.cameras if gallery else None),
        tensor(positions if (positions >= 0).any() else None),
        in_gallery,
    )


def _prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": float(value) for name, value in metrics.items()}


@torch.inference_mode()
def stream_outputs(
    images: LabelledImages, sources: Sources, stage: str, outputs: Outputs
) -> Iterator[dict[str, Tensor]]:
    """Yield outputs of this rank's blocks of a set, batch after batch.

    Args:
        images: The set.
        sources: Where batches come from.
        stage: Of the work, for the progress.
        outputs: Images or features of a batch to tensors (b, ...), by name.

    Yields:
        What `outputs` returns, and "sample" (b,), the places in the set.
    """
    size = block_rows(len(images))
    rows = list(blocks(len(images), size, rank(), world_size(), BATCH[sources.device.type]))
    batches, done = zip(sources.batches(images, rows), rows, strict=True), 0

    @torch.inference_mode()
    def outputs_of(batch: Tensor, samples: Rows) -> dict[str, Tensor]:
        return outputs(batch) | {"sample": torch.tensor([sample for sample, _ in samples])}

    while at_once := list(itertools.islice(batches, sources.at_once)):
        for batch_outputs in sources.each(outputs_of, *zip(*at_once, strict=True)):
            done += len(batch_outputs["sample"]) * world_size()
            yield batch_outputs
        sources.progress.note(stage, min(len(images), done), len(images))


@torch.inference_mode()
def _embed(images: LabelledImages, sources: Sources, stage: str, outputs: Outputs) -> dict[str, Tensor]:
    """Embed this rank's blocks of a set, one under the other: (n, D) by name."""
    parts = list(stream_outputs(images, sources, stage, outputs))
    if not parts:  # fewer blocks than ranks: this one has none, but knows the widths
        sample = next(sources.batches(images, [[(0, None)]]))
        parts.append({name: rows[:0] for name, rows in outputs(sample).items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "sample"}


def validation_metrics(learner: Learner, task: Retrieval, sources: Sources) -> dict[str, float]:
    """Return val/* metrics of the validation classes."""
    return retrieval_of_learner(learner, task, sources, "validation", "val")


def baseline_metrics(untrained: Learner, splits: Splits, sources: Sources) -> dict[str, float]:
    """Return untrained/* and features/* metrics of the first test: the same network untrained, and its raw features."""

    def outputs(x: Tensor) -> dict[str, Tensor]:
        features = untrained.features(x)
        return {"untrained": untrained.embed(features), "features": features}

    return retrieval_of(splits.tests["test"], sources, "baselines", outputs)


def embeddings_of(learner: Learner, x: Tensor) -> dict[str, Tensor]:
    """Return raw embeddings "z" (b, D) of images or features."""
    return {"z": learner.embed(x)}


def load_sources(job: ModelJob) -> Sources:
    """Load a checkpoint's learner in evaluation mode, and what gives it batches, as one worker of several has them."""
    config, device = job.config, device_of_worker(job.config)
    torch.set_num_threads(1)
    with received_files(job.model) as folder:
        learner = build_embedder(config, folder)
    learner.to(device, torch.float64 if config.precision == "float64" else torch.float32)
    progress = Reporter(job.worker.board if rank() == 0 else None)
    data = job.data or identify(config.data)
    sources = Sources(config, learner, device, job.worker.cpus, progress, data)
    prepare_passes(learner, sources)
    return sources


def evaluate_loop(job: EvaluationJob) -> Evaluated:
    """Return test metrics of a checkpoint, as one worker of several, and write a row for each query if asked."""
    sources = load_sources(job)
    tests = load_tests(sources.config, job.unreadable, job.every)
    see = None if job.out is None else partial(write_queries, job.out, tests["test"])
    return Evaluated(test_metrics(sources.learner, tests, sources, see), world_size())
