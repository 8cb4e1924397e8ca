"""The only place, with variation.py's one reduce, where rank and world size exist.

Every function is the identity when there is one process, so that the same code runs alone and in a group.
Works with gloo (CPU) and NCCL (GPU).
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Return how many processes there are; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, 0 to world_size() - 1."""
    return dist.get_rank() if world_size() > 1 else 0


class _Gather(torch.autograd.Function):
    """All-gather along dim 0. Backward is its adjoint: the sum over ranks of the gradient of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        return own_rows(all_sum(gradient.clone(memory_format=torch.contiguous_format)))


def gather(x: Tensor) -> Tensor:
    """Return the rows of all ranks in rank order, differentiable.

    Where every rank computes the same loss L of the gathered rows, each gets world * dL/dx. The mean over ranks that
    DistributedDataParallel takes cancels that factor for what lies before the gather, and changes nothing for what lies
    behind it (proxies, heads): every parameter gets dL/dp once. learner.py, which sums gradients itself, gathers rows
    that need none.

    Args:
        x: (b, ...) rows of this rank; the same shape on every rank.

    Returns:
        (world * b, ...) rows.
    """
    return x if world_size() == 1 else _Gather.apply(x)


def collect(x: Tensor, destination: int) -> list[Tensor]:
    """Send a tensor of every rank to one of them.

    Args:
        x: The tensor of this rank; the same shape on every rank.
        destination: The rank that receives them.

    Returns:
        On `destination` the tensors of all ranks in rank order; elsewhere [x].
    """
    if world_size() == 1:
        return [x]
    parts = [torch.empty_like(x) for _ in range(world_size())] if rank() == destination else None
    dist.gather(x.contiguous(), parts, destination)
    return parts or [x]


def own_rows(x: Tensor) -> Tensor:
    """Return the rows of a gathered x that come from this rank."""
    return x.chunk(world_size())[rank()]


def tree_sum(parts: Sequence[Tensor]) -> Tensor:
    """Sum over the parts of all ranks, in the order of a binary tree: ((1 + 2) + (3 + 4)) + ((5 + 6) + (7 + 8)).

    Where both numbers are powers of two, the same parts give the same bits however many ranks they lie on: each pair is
    added on one rank or, by a + b = b + a, alike on two.

    Args:
        parts: The parts of this rank, of one shape; as many on every rank.

    Returns:
        The sum, on every rank.
    """
    while len(parts) > 1:
        parts = [sum(parts[i : i + 2][1:], parts[i]) for i in range(0, len(parts), 2)]
    total, world = parts[0], world_size()
    if world & (world - 1):
        return all_sum(total.clone())
    for level in range(world.bit_length() - 1):
        other, partner = torch.empty_like(total), rank() ^ (1 << level)
        exchange = [dist.P2POp(dist.isend, total, partner), dist.P2POp(dist.irecv, other, partner)]
        for request in dist.batch_isend_irecv(exchange):
            request.wait()
        total = total + other
    return total


def all_sum(x: Tensor) -> Tensor:
    """Sum x over all ranks, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def broadcast_object(value: T) -> T:
    """Return rank 0's value on every rank: any small object that can be pickled. Waits until rank 0 calls it, too."""
    if world_size() > 1:
        objects = [value]
        dist.broadcast_object_list(objects, 0)
        return objects[0]
    return value


def broadcast(x: Tensor, source: int) -> Tensor:
    """Overwrite x with that of the rank `source`, in place, and return it."""
    if world_size() > 1:
        dist.broadcast(x, source)
    return x
