"""A training in one worker: everything that it has before its first step, and what it does between epochs."""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.fs
import torch

from dml_core.data.datasets import SetIdentity, Splits
from dml_core.data.sampling import BatchPlan
from dml_core.gather import broadcast, broadcast_object, own_columns, rank, world_size
from dml_core.learner import Learner, Terms
from dml_core.replica import Replica
from pipelines.cluster.progress import Reporter
from pipelines.cluster.threads import torch_threads
from pipelines.cluster.worker import PreemptionWatch, Worker, device_of_worker
from pipelines.config.schema import Config
from pipelines.data.sets import identify, load_splits
from pipelines.data.sources import Sources
from pipelines.models import checkpoint
from pipelines.models.build import build_learner
from pipelines.models.checkpoint import TrainingState, load_weights
from pipelines.models.run_folder import checkpoint_name, keep_checkpoint, local_copy, locate, newest_checkpoint
from pipelines.models.start import kept_start, take_over
from pipelines.phases import Clock
from pipelines.tracking.records import EpochRecord
from pipelines.training.evaluation import (
    baseline_metrics,
    embeddings_of,
    stream_outputs,
    test_metrics,
    validation_metrics,
)
from pipelines.training.history import STEP_COLUMNS, final_metrics, now_in_ms
from pipelines.training.job import TrainingJob, TrainingResult
from pipelines.training.optimizer import build_optimizer, build_schedule
from pipelines.training.passes import prepare_passes


class Batches(NamedTuple):
    """This rank's part of an epoch's global batches.

    Attributes:
        first_step: The first step of the epoch that is not done yet.
        samples: (steps, b), for each step from there the places in the training set.
        images: Yields uint8 (b, 3, S, S), or features (b, F), in that order.
    """

    first_step: int
    samples: np.ndarray
    images: Iterator[torch.Tensor]


@dataclass
class Training:
    """One worker's training: its parts, and the sentences of the loop that stand between epochs.

    Attributes:
        data: What the set is.
        job: What the worker was given; `job.config` is the config of the whole run.
        settings: The config that holds in the current epoch, see Config.at.
        splits: Training classes, validation classes, and tests.
        labels: (N,) of the training set.
        learner: On this worker's device, in training mode.
        replica: The learner as DistributedDataParallel has it; None where gradients are exact.
        sources: Where batches of a set come from.
        plan: The global batches of every epoch.
        files, folder: The file system and the path of the run's folder.
        report: Called with the metrics of each validated epoch.
        state: How far the training is.
        history: A record of each finished epoch.
        steps: (n, T + 1) float64, of the steps taken in the epoch under way: the T terms, and the gradient's norm.
        noise: Draws synthetics; in the same state on every rank.
        generators: All that are seeded at each step: `noise`, and those that the library's miners draw from.
        preemption: Tells that this worker's node will be taken away.
        clock: Measures where the seconds go.
        startup_seconds: From the start of the command to the end of the first step; none before that.
    """

    data: SetIdentity
    job: TrainingJob
    settings: Config
    device: torch.device
    splits: Splits
    labels: torch.Tensor
    learner: Learner
    replica: torch.nn.Module | None
    sources: Sources
    plan: BatchPlan
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    files: pyarrow.fs.FileSystem
    folder: str
    progress: Reporter
    report: Callable[[dict[str, float]], object]
    noise: torch.Generator
    generators: list[torch.Generator]
    preemption: PreemptionWatch
    clock: Clock
    startup_seconds: dict[str, float] = field(default_factory=dict)
    state: TrainingState = field(default_factory=TrainingState)
    history: list[EpochRecord] = field(default_factory=list)
    steps: torch.Tensor = field(default_factory=lambda: torch.zeros(0, len(STEP_COLUMNS), dtype=torch.float64))

    @property
    def config(self) -> Config:
        """The config of the whole run."""
        return self.job.config

    def end_first_step(self) -> dict[str, float]:
        """Return how long it took to get here, which the final metrics have, too."""
        self.clock.lap("first step")
        if self.job.started is not None:
            self.startup_seconds = {"train/startup_seconds": time.time() - self.job.started}
        return self.startup_seconds

    @property
    def is_main(self) -> bool:
        """Whether this rank keeps checkpoints and tells of the progress."""
        return rank() == 0

    def resume(self) -> None:
        """Take over the run's newest whole checkpoint, if there is one, and hand its history to the driver."""
        name = broadcast_object(newest_checkpoint(self.files, self.folder) if self.is_main else None)
        if name is not None:
            with local_copy(self.files, f"{self.folder}/{name}") as local:
                loaded = checkpoint.load(local, self.learner, self.optimizer, self.schedule)
            self.state, self.history, self.steps = loaded
        self.progress.record(self.history)
        for tensor in self.learner.state_dict().values():
            broadcast(tensor, 0)

    def epochs(self) -> Iterator[tuple[int, Batches]]:
        """Yield each epoch that is not finished, from 0, with its batches: the first may have been left in its middle.

        The batches of all epochs are one stream, so that what decodes them goes on while the loop validates.
        """
        numbers = range(self.state.epoch, self.config.epochs)
        first_steps = {self.state.epoch: self.state.step}
        columns = own_columns(self.config.batch.size, self.config.slices)
        rows_to_decode, rows_of_epochs = itertools.tee(
            self.plan.rows(epoch, columns).after(first_steps.get(epoch, 0)) for epoch in numbers
        )
        stream = self.sources.batches(self.splits.train, itertools.chain.from_iterable(rows_to_decode))
        for epoch, rows in zip(numbers, rows_of_epochs, strict=True):
            yield epoch, Batches(first_steps.get(epoch, 0), rows.samples, stream)

    def change_settings(self, epoch: int) -> None:
        """Build the learner anew where `changes` set other values for this epoch: parameters and statistics stay."""
        settings = self.config.at(epoch)
        if settings == self.settings:
            return
        self.settings, earlier = settings, self.learner
        self.learner = build_on(settings, len(self.splits.train.class_names), self.device, read_weights=False)
        self.learner.load_state_dict(earlier.state_dict(keep_vars=True), assign=True)
        # Through a network of the same parameters; the loss is recorded anew, as its learner is another.
        self.learner.passes, self.learner.run_loss = earlier.passes, earlier.run_loss
        if self.replica is not None:  # which knows parameters, and these are still the same
            getattr(self.replica, "module", self.replica).learner = self.learner

    def backward(self, images: torch.Tensor, labels: torch.Tensor, epoch: int) -> Terms:
        """Add to every .grad the gradient of a global batch, of which this rank has `images` and `labels`."""
        slices = self.config.slices
        if self.replica is None:
            return self.learner.backward(images, labels, epoch, self.noise, slices, self.sources.each)
        with torch_threads(self.sources.cpus):
            terms = self.replica(images, labels, epoch, self.noise, slices)
            terms.loss.backward()
        return terms

    def estimate_variation(self, epoch: int) -> None:
        """Estimate how each class varies over the whole training set, where IAA wants it before this epoch."""
        iaa, is_begun = self.learner.iaa, epoch == self.state.epoch and self.state.step > 0
        if iaa is None or not iaa.due(epoch) or is_begun:
            return
        self.learner.eval()
        batches = stream_outputs(self.splits.train, self.sources, "variation", partial(embeddings_of, self.learner))
        iaa.estimate((batch["z"], self.labels[batch["sample"]].to(self.device)) for batch in batches)
        self.learner.train()

    def validates_after(self, epoch: int) -> bool:
        """Whether an epoch ends with a validation, where there are validation classes, and a checkpoint."""
        return (epoch + 1) % self.config.evaluate_every == 0 or epoch + 1 == self.config.epochs

    def validate(self, epoch: int) -> dict[str, float]:
        """Return val/* metrics; none where no classes are held out."""
        if self.splits.validation is None:
            return {}
        self.learner.eval()
        metrics = validation_metrics(self.learner, self.splits.validation, self.sources)
        self.learner.train()
        self.clock.lap("validation")
        steps, total = (epoch + 1) * self.plan.steps, self.config.epochs * self.plan.steps
        self.progress.note("training", steps, total, {"recall": metrics["val/recall_at_1"]})
        return metrics

    def remember(self, epoch: int, metrics: dict[str, float]) -> None:
        """Add a finished epoch to the history."""
        record = EpochRecord(time=now_in_ms(), step=epoch + 1, metrics=metrics, first_step=epoch * self.plan.steps)
        record["step_loss"] = self.steps[:, 0].tolist()
        self.history.append(record)
        self.steps = self.steps[:0]

    def keep(self, epoch: int, metrics: dict[str, float]) -> None:
        """Store a checkpoint of a finished epoch. The best epoch is the last where nothing is validated."""
        score, best_score = metrics.get("val/map_at_r"), self.state.best_score
        is_best = score is None or best_score is None or score > best_score
        best = (epoch + 1, score) if is_best else (self.state.best_epoch, best_score)
        self.state = TrainingState(epoch + 1, *best)
        if self.is_main:
            self.store(self.state, metrics)
        self.clock.lap("checkpoints")

    def store(self, state: TrainingState, metrics: dict[str, float]) -> None:
        """Write a checkpoint; it is in the run's folder when this returns."""
        with tempfile.TemporaryDirectory(prefix="dml-") as scratch:
            checkpoint.save(
                Path(scratch),
                self.config,
                self.data,
                self.splits.train.class_names,
                self.learner,
                self.optimizer,
                self.schedule,
                state,
                self.history,
                metrics,
                self.steps,
            )
            keep_checkpoint(self.files, self.folder, Path(scratch), state)

    def tell(self, epoch: int, metrics: dict[str, float]) -> None:
        """Report a validated epoch to Ray, and hand every epoch's record to the driver.

        Ray gets metrics alone: it stores a checkpoint when it next looks at its workers, and loses it if one
        dies before.
        """
        if self.validates_after(epoch):
            self.report({"epoch": epoch + 1, **self.best_metrics(), **metrics})
        self.progress.record(self.history[-1:])

    def best_metrics(self) -> dict[str, float]:
        """Return the best validated score so far; none where nothing is validated."""
        return {} if self.state.best_score is None else {"val/best_map_at_r": self.state.best_score}

    def test_best(self) -> TrainingResult:
        """Test the best epoch's weights, once, beside the same network untrained and its raw features."""
        best = broadcast_object(checkpoint_name(self.state.best_epoch))  # when rank 0 has stored it
        metrics = self.history[-1]["metrics"] | {"best_epoch": float(self.state.best_epoch)} | self.best_metrics()
        metrics |= self.startup_seconds
        metrics["data/left_out"] = float(len(self.job.unreadable))
        if self.job.test:
            with local_copy(self.files, f"{self.folder}/{best}") as local:
                load_weights(local, self.learner)
            self.learner.eval()
            metrics |= test_metrics(self.learner, self.splits.tests, self.sources)
            untrained = build_begun(self.config, self.splits.train.class_names, self.device).eval()
            metrics |= baseline_metrics(untrained, self.splits, self.sources)
            self.clock.lap("test")
        end = EpochRecord(time=now_in_ms(), step=self.config.epochs, metrics=final_metrics(metrics))
        return TrainingResult(metrics, [*self.history, end], [*self.clock.phases.values()])


def begin(job: TrainingJob) -> Training:
    """Load the sets, build the learner, the plan of global batches, the optimizer and its schedule."""
    config, clock = job.config, Clock()
    torch.set_num_threads(1)  # the order of a sum depends on it; CPUs share slices and batches instead (sources.each)
    device, progress = device_of_worker(config), Reporter(job.worker.board if rank() == 0 else None)
    progress.note("preparing", 0, 1)
    splits = load_splits(config, job.unreadable)
    data = job.data or identify(config.data)
    learner = build_begun(config, splits.train.class_names, device)
    batch = config.batch
    plan = BatchPlan(splits.train.labels, batch.classes, batch.images, config.seed, config.steps_per_epoch)
    optimizer = build_optimizer(config, learner)
    files, folder = locate(config)
    noise = torch.Generator(device)
    sources = Sources(config, learner, device, job.worker.cpus, progress, data)
    generators = [noise, *global_generators(device)]
    prepare_passes(learner, sources, generators)
    return Training(
        data=data,
        job=job,
        settings=config.at(0),
        device=device,
        splits=splits,
        labels=torch.from_numpy(splits.train.labels),
        learner=learner,
        replica=replicate(learner, sources.autocast(), job.worker) if config.gradients == "ddp" else None,
        sources=sources,
        plan=plan,
        optimizer=optimizer,
        schedule=build_schedule(config, optimizer, plan.steps),
        files=files,
        folder=folder,
        progress=progress,
        report=job.worker.report or report_to_ray_train,
        preemption=PreemptionWatch(job.worker.is_of_ray_train),
        clock=clock,
        noise=noise,
        generators=generators,
    )


def replicate(learner: Learner, autocast: torch.autocast, worker: Worker) -> torch.nn.Module:
    """Wrap a learner in DistributedDataParallel; a group of one needs none."""
    replica = Replica(learner, autocast)
    if world_size() == 1:
        return replica
    options: dict[str, Any] = {
        "find_unused_parameters": False,
        "broadcast_buffers": False,
        "gradient_as_bucket_view": True,
    }
    if not worker.is_of_ray_train:
        return torch.nn.parallel.DistributedDataParallel(replica, **options)
    from ray.train.torch import prepare_model  # a second of import

    return prepare_model(replica, parallel_strategy_kwargs=options)


def report_to_ray_train(metrics: dict[str, float]) -> None:
    """Report metrics from a worker of Ray Train."""
    import ray.train  # a second of import, which a training in the driver's own process does without

    ray.train.report(metrics)


def build_on(config: Config, classes: int, device: torch.device, read_weights: bool = True) -> Learner:
    """Build a learner on a device, in the run's precision. Arguments as of build_learner."""
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    return build_learner(config, classes, read_weights).to(device, dtype)


def build_begun(config: Config, class_names: Sequence[str], device: torch.device) -> Learner:
    """Build a learner as a run begins: with what an earlier run has learned, or as the seed initialises it.

    Args:
        config: Of the run.
        class_names: Of its training classes, by label.
        device: Of this worker.
    """
    with kept_start(config) as start:
        learner = build_on(config, len(class_names), device, read_weights=start is None)
        if start is not None:
            take_over(learner, start, config, class_names)
    return learner


def global_generators(device: torch.device) -> list[torch.Generator]:
    """Return the generators that the library's miners draw from: torch.manual_seed, which seeds them, takes 2 ms."""
    if device.type == "cuda":
        torch.cuda.init()
        return [torch.default_generator, torch.cuda.default_generators[device.index or torch.cuda.current_device()]]
    return [torch.default_generator]
