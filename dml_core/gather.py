"""The only place, with variation.py's one reduce, where rank and world size exist.

Every function is the identity when there is one process, so that the same code runs alone and in a group.
Works with gloo (CPU) and NCCL (GPU).
"""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


class _Gather(torch.autograd.Function):
    """All-gather along dim 0. Backward is its adjoint: the sum over ranks of the gradient of this rank's rows."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.rows = len(x)
        rows = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order, differentiable.

    x: (b, ...), the same shape on every rank. Returns (world * b, ...).

    When every rank computes the same loss L of the gathered rows, the backward hands each rank world * dL/dx. The mean
    over ranks that DistributedDataParallel takes cancels that factor for what lies before the gather, and changes
    nothing for what lies behind it (proxies, projections): every parameter gets dL/dp exactly once.
    """
    if world_size() == 1:
        return x
    return _Gather.apply(x)


def all_sum(x: Tensor) -> Tensor:
    """Sum over ranks, in place. Not differentiable."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def agreed(value: T) -> T:
    """What rank 0 was given, on every rank: any small object. Nobody gets it before rank 0 asks."""
    if world_size() > 1:
        held = [value]
        dist.broadcast_object_list(held, 0)
        return held[0]
    return value


def broadcast(x: Tensor, source: int) -> Tensor:
    """Overwrite x with what rank `source` holds, in place."""
    if world_size() > 1:
        dist.broadcast(x, source)
    return x
