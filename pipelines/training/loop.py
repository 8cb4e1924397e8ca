"""The training loop of one worker, in the data's order. Read after dml_core/learner.py."""

import itertools
import math
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import torch

from dml_core.data.sampling import STEP, BatchPlan, derive_seed
from dml_core.gather import agreed, broadcast, rank, world_size
from dml_core.learner import Learner, Terms
from pipelines.cluster.progress import Reporter
from pipelines.cluster.worker import device_of_worker, preemption_noticed
from pipelines.config.recipe import parse_config
from pipelines.data.sets import load_splits
from pipelines.data.sources import Sources
from pipelines.models import checkpoint, run_folder
from pipelines.models.build import build_learner
from pipelines.models.checkpoint import TrainingState, load_weights
from pipelines.models.run_folder import checkpoint_name, keep_checkpoint, local_copy, newest_checkpoint
from pipelines.training.epoch import epoch_metrics, require_finite
from pipelines.training.evaluation import retrieval_of, retrieval_of_learner, stream_outputs, test_metrics
from pipelines.training.history import final_metrics, now_in_ms
from pipelines.training.optimizer import build_optimizer, build_schedule
from pipelines.training.setup import global_generators


def train_loop(job: dict[str, Any]) -> dict[str, float]:
    """Train, evaluate, and test at the end; the same on every rank. Returns the final metrics.

    job: config (a dict), run_id and tracking_uri of MLflow (None: not logged), cpus (CPUs of this worker), board
    (progress; may be None), unreadable (pictures to leave out), test (False: not even at the end, as a sweep chooses
    by validation classes alone), report (who is told of a validated epoch; None: Ray Train).
    ArithmeticError when the loss is no longer finite.
    """
    cfg = parse_config(job["config"])
    device, world, main = device_of_worker(cfg), world_size(), rank() == 0
    torch.set_num_threads(1)  # the order of a sum depends on it; CPUs share slices and batches instead (sources.each)
    progress = Reporter(job["board"] if main else None)
    report = job["report"] or ray.train.report

    # Data: the plan of global batches, and where the rows come from.
    splits = load_splits(cfg, job["unreadable"])
    classes = splits.train.class_names
    dtype = torch.float64 if cfg.precision == "float64" else torch.float32
    learner = build_learner(cfg, len(classes)).to(device, dtype)
    sources = Sources(cfg, learner, device, job["cpus"], progress)
    source, labels = sources.of(splits.train), torch.from_numpy(splits.train.labels)
    batch = cfg.batch
    plan = BatchPlan(splits.train.labels, batch.classes, batch.images, cfg.seed, cfg.steps_per_epoch)

    # State: a new one, or that of the newest whole checkpoint.
    optimizer = build_optimizer(cfg, learner)
    schedule = build_schedule(cfg, optimizer, plan.steps)
    state, history, steps = TrainingState(), list[dict[str, Any]](), torch.zeros(0, len(Terms._fields) + 1).double()
    files, folder = run_folder.locate(cfg)
    if (newest := agreed(newest_checkpoint(files, folder) if main else None)) is not None:
        with local_copy(files, f"{folder}/{newest}") as local:
            state, history, steps = checkpoint.load(local, learner, optimizer, schedule)
    tracker = None
    if main and job["tracking_uri"]:
        from pipelines.tracking.sender import (
            MetricSender,  # MLflow takes seconds to import, and one rank alone speaks to it
        )

        tracker = MetricSender(job["tracking_uri"], job["run_id"], history)

    def keep(state: TrainingState, metrics: dict[str, float], steps: torch.Tensor) -> None:
        """In the run's folder when this returns."""
        with tempfile.TemporaryDirectory(prefix="dml-") as made:
            given = cfg, classes, learner, optimizer, schedule, state, history, metrics, steps
            checkpoint.save(Path(made), *given)
            keep_checkpoint(files, folder, Path(made), state)

    for tensor in learner.state_dict().values():
        broadcast(tensor, 0)
    # One stream over all epochs: what decodes goes on while the loop validates.
    epochs = range(state.epoch, cfg.epochs)
    behind = {state.epoch: state.step}  # of an epoch that was left in its middle
    ahead, now = itertools.tee(plan.slices(e, rank(), world).after(behind.get(e, 0)) for e in epochs)
    batches = source.batches(itertools.chain.from_iterable(ahead), sources.processes)
    parts = cfg.slices // world if cfg.slices % world == 0 else 1
    noise = torch.Generator(device)
    generators = [noise, *global_generators(device)]
    parameters = [p for p in learner.parameters() if p.requires_grad]
    settings = cfg.at(0)

    for epoch, rows in zip(epochs, now, strict=True):
        # Settings that change here: another learner, of the same parameters and statistics.
        if (changed := cfg.at(epoch)) != settings:
            settings, state_now = changed, learner.state_dict(keep_vars=True)
            learner = build_learner(settings, len(classes), read_weights=False).to(device, dtype)
            learner.load_state_dict(state_now, assign=True)
        first = behind.get(epoch, 0)
        # Epoch hook: how each class varies now, over the whole training set (IAA).
        if learner.iaa is not None and learner.iaa.due(epoch) and not first:
            learner.eval()
            seen = stream_outputs(splits.train, sources, "variation", partial(_embedded, learner))
            learner.iaa.estimate((part["z"], labels[part["sample"]].to(device)) for part in seen)
            learner.train()

        started, waited, since = time.perf_counter(), 0.0, []
        for step, samples in enumerate(rows.samples, first):
            asked = time.perf_counter()
            x, y = next(batches), labels[samples]
            waited += time.perf_counter() - asked
            seed = derive_seed(cfg.seed, STEP, epoch, step)
            for generator in generators:
                generator.manual_seed(seed)
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            optimizer.zero_grad()
            terms = learner.backward(x, y, epoch, noise, parts, sources.each)
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if cfg.optimizer.clip_norm:
                torch.nn.utils.clip_grads_with_norm_(parameters, cfg.optimizer.clip_norm, norm)
            optimizer.step()
            schedule.step()
            since.append(torch.stack([t.detach().double() for t in (*terms, norm)]))
            done = epoch * plan.steps + step + 1
            if (
                main
                and step + 1 < plan.steps
                and (preemption_noticed() or done % (cfg.checkpoint_every or math.inf) == 0)
            ):
                at = torch.cat([steps, torch.stack(since).cpu()])
                require_finite(at, epoch)
                keep(state._replace(epoch=epoch, step=step + 1), {}, at)
            if progress.due():
                speed = len(since) * len(x) * world
                progress.note(
                    "training",
                    done,
                    cfg.epochs * plan.steps,
                    epoch=f"{epoch + 1}/{cfg.epochs}",
                    loss=terms.loss.item(),
                    images_per_second=speed / (time.perf_counter() - started),
                )
        seconds = time.perf_counter() - started
        steps = torch.cat([steps, torch.stack(since).cpu()])
        require_finite(steps, epoch)

        # Report: the epoch's means, validation when it is due, a checkpoint with all history, then MLflow.
        metrics = epoch_metrics(steps, optimizer) | {
            "train/images_per_second": len(since) * batch.classes * batch.images / seconds,
            "train/data_wait": waited / seconds,
        }
        due = (epoch + 1) % cfg.evaluate_every == 0 or epoch + 1 == cfg.epochs
        if due and splits.validation is not None:
            learner.eval()
            metrics |= retrieval_of_learner(learner, splits.validation, sources, "validation", "val")
            learner.train()
            steps_done, recall = (epoch + 1) * plan.steps, metrics["val/recall_at_1"]
            progress.note("training", steps_done, cfg.epochs * plan.steps, recall=recall)
        record = {"time": now_in_ms(), "step": epoch + 1, "metrics": metrics, "first_step": epoch * plan.steps}
        history.append(record | {"step_loss": steps[:, 0].tolist()})
        steps = steps[:0]
        if due:
            score = metrics.get("val/map_at_r", float(epoch))
            better = score > state.best_score
            state = TrainingState(epoch + 1, *((epoch + 1, score) if better else state[1:3]))
            if main:
                keep(state, metrics, steps)
            # Metrics alone: Ray stores a checkpoint when it next looks at its workers, and loses it if one dies before.
            report({"epoch": epoch + 1, "val/best_map_at_r": state.best_score, **metrics})
        if tracker:
            tracker.log(history[-1])

    # Test: once, with the best epoch's weights, beside the same network untrained and its raw features.
    best = agreed(checkpoint_name(state.best_epoch))  # when rank 0 has stored it
    metrics = history[-1]["metrics"] | {"best_epoch": float(state.best_epoch), "val/best_map_at_r": state.best_score}
    metrics["data/left_out"] = float(len(job["unreadable"]))
    if job["test"]:
        with local_copy(files, f"{folder}/{best}") as local:
            load_weights(local, learner)
        learner.eval()
        metrics |= test_metrics(learner, splits, sources)
        untrained = build_learner(cfg, len(classes)).to(device, dtype).eval()
        metrics |= retrieval_of(splits.tests["test"], sources, "baselines", lambda x: _baselines(untrained, x))
    unsent = 0
    if tracker:
        tracker.log({"time": now_in_ms(), "step": cfg.epochs, "metrics": final_metrics(metrics)})
        unsent = tracker.close()
    return metrics | {"unsent": float(unsent)}


def _embedded(learner: Learner, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"z": learner.embed(x)}


def _baselines(learner: Learner, x: torch.Tensor) -> dict[str, torch.Tensor]:
    features = learner.features(x)
    return {"untrained": learner.embed(features), "features": features}
