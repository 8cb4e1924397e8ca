"""One epoch of training steps."""

import numpy as np
import torch

from dml_core.learner import Terms


def epoch_metrics(steps: torch.Tensor, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Means over the steps of an epoch; steps (steps, terms + 1)."""
    means = zip((*Terms._fields, "gradient_norm"), steps.mean(0).tolist(), strict=True)
    metrics = {f"train/{name}": value for name, value in means}
    return metrics | {"train/lr": min(group["lr"] for group in optimizer.param_groups)}


def require_finite(steps: torch.Tensor, epoch: int) -> None:
    terms = steps[:, :-1]
    if not terms.isfinite().all():
        step = int(np.flatnonzero(~terms.isfinite().all(1).numpy())[0])
        raise ArithmeticError(f"the loss is not finite at epoch {epoch + 1}, step {step + 1}; try a lower optimizer.lr")
