"""The optimizer, with a learning rate for backbone, heads and loss each, and the learning-rate schedule."""

import math

import torch
from torch import nn

from dml_core.learner import Learner
from pipelines.config.schema import Config


def build_optimizer(config: Config, module: Learner) -> torch.optim.Optimizer:
    """Three groups with their own learning rates: backbone, heads and methods, the base loss's parameters.

    Scales and shifts of norms, and biases, are not decayed; nor are parameters of the loss.
    """
    o = config.optimizer
    assert module.base_loss is not None
    loss_parameters = set(module.base_loss.parameters())
    backbone_parameters = set(module.backbone.parameters())
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        multiplier = o.head_multiplier
        decay = o.weight_decay if parameter.ndim > 1 else 0.0
        if parameter in loss_parameters:
            multiplier, decay = o.loss_multiplier, 0.0
        elif parameter in backbone_parameters:
            multiplier = 1.0
        groups.setdefault((o.lr * multiplier, decay), []).append(parameter)
    parameters = [{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()]
    if o.name == "sgd":
        return torch.optim.SGD(parameters, lr=o.lr, momentum=0.9 if o.momentum is None else o.momentum)
    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[o.name](parameters, lr=o.lr, fused=True)


def build_schedule(
    config: Config, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Learning rate by optimizer step, `steps` of which make an epoch."""
    o, total = config.optimizer, config.epochs * steps

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / (o.warmup * steps)) if o.warmup else 1.0
        if o.schedule == "cosine":
            return rise * 0.5 * (1 + math.cos(math.pi * step / total))
        if o.schedule == "step":
            assert o.milestones and o.gamma
            return rise * o.gamma ** sum(step >= m * steps for m in o.milestones)
        return rise

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
