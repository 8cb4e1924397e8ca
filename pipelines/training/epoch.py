"""One epoch: its steps, each over one global batch, and the means of what they measured."""

import math
import time

import numpy as np
import torch
from torch import Tensor

from dml_core.data.loading import send
from dml_core.data.sampling import STEP, derive_seed
from dml_core.learner import Terms
from pipelines.training.history import STEP_COLUMNS
from pipelines.training.setup import Batches, Training


def train_epoch(training: Training, epoch: int, batches: Batches) -> dict[str, float]:
    """Take an epoch's steps.

    Returns:
        train/* metrics: means of the loss's terms and of the gradient's norm, learning rate, images per second, the
        share of the time that was spent waiting for data, and once the seconds from the command to the first step.

    Raises:
        ArithmeticError: The loss is no longer finite.
    """
    config, plan, main = training.config, training.plan, training.is_main
    parameters = [p for p in training.learner.parameters() if p.requires_grad]
    started, seconds_waited, measured = time.perf_counter(), 0.0, list[Tensor]()
    startup: dict[str, float] = {}  # of the first epoch in this process
    for step, samples in enumerate(batches.samples, batches.first_step):
        asked = time.perf_counter()
        images, labels = next(batches.images), training.labels[samples]
        seconds_waited += time.perf_counter() - asked
        terms, norm = train_step(training, epoch, step, images, labels, parameters)
        measured.append(torch.stack([value.detach().double() for value in (*terms, norm)]))
        if "first step" not in training.clock.phases:
            startup = training.end_first_step()

        steps_done = epoch * plan.steps + step + 1
        wants_checkpoint = steps_done % (config.checkpoint_every or math.inf) == 0
        if main and step + 1 < plan.steps and (training.preemption.new_notice() or wants_checkpoint):
            store_within_epoch(training, epoch, step + 1, measured)
        if training.progress.due():
            seconds = time.perf_counter() - started
            training.progress.note(
                "training",
                steps_done,
                config.epochs * plan.steps,
                {
                    "epoch": f"{epoch + 1}/{config.epochs}",
                    "loss": terms.loss.item(),
                    "images_per_second": len(measured) * config.batch.size / seconds,
                },
            )
    seconds = time.perf_counter() - started
    training.steps = torch.cat([training.steps, torch.stack(measured).cpu()])
    require_finite(training.steps, epoch)
    training.clock.lap("steps")
    return startup | {
        **means_of(training.steps),
        "train/lr": min(group["lr"] for group in training.optimizer.param_groups),
        "train/images_per_second": len(measured) * config.batch.size / seconds,
        "train/data_wait": seconds_waited / seconds,
    }


def train_step(
    training: Training,
    epoch: int,
    step: int,
    images: Tensor,
    labels: Tensor,
    parameters: list[torch.nn.Parameter],
) -> tuple[Terms, Tensor]:
    """Take one step of the optimizer on a global batch, of which this rank has `images` and `labels`.

    Returns:
        The terms of the loss, and the norm of the gradient before it is clipped.
    """
    config, device = training.config, training.device
    seed = derive_seed(config.seed, STEP, epoch, step)
    for generator in training.generators:
        generator.manual_seed(seed)
    labels = send(labels, device)
    training.optimizer.zero_grad()
    terms = training.backward(images, labels, epoch)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if config.optimizer.clip_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.optimizer.clip_norm, norm)
    training.optimizer.step()
    training.schedule.step()
    return terms, norm


def store_within_epoch(training: Training, epoch: int, steps: int, measured: list[Tensor]) -> None:
    """Store a checkpoint of an epoch of which so many steps are done."""
    before = training.steps
    training.steps = torch.cat([before, torch.stack(measured).cpu()])
    require_finite(training.steps, epoch)
    training.store(training.state._replace(epoch=epoch, step=steps), {})
    training.steps = before


def means_of(steps: Tensor) -> dict[str, float]:
    """Return the mean of each column over an epoch's steps (n, columns)."""
    return {f"train/{name}": mean for name, mean in zip(STEP_COLUMNS, steps.mean(0).tolist(), strict=True)}


def require_finite(steps: Tensor, epoch: int) -> None:
    """Raise ArithmeticError that names the first step (n, columns) with a term that is not finite."""
    terms = steps[:, :-1]
    if not terms.isfinite().all():
        step = int(np.flatnonzero(~terms.isfinite().all(1).numpy())[0])
        raise ArithmeticError(
            f"the loss is not finite at epoch {epoch + 1}, step {step + 1}; try a lower optimizer.lr, by another name"
        )
