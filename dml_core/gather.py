"""The only place where rank and world size exist.

A global batch is cut into S equal slices, which are dealt to W <= S ranks: consecutive ones to each, and counts that
differ by one at most. Rows of slices are gathered, and what each slice gives is summed along a tree that knows the
slices alone: no result depends on W. docs/global_batch.md has the picture.

Every function is the identity when there is one process, so that the same code runs alone and in a group.
Works with gloo (CPU) and NCCL (GPU).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

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


def slices_of(rank: int, world: int, slices: int) -> range:
    """Return which slices of a global batch a rank of so many holds."""
    return range(rank * slices // world, (rank + 1) * slices // world)


class _Gather(torch.autograd.Function):
    """All-gather along dim 0. Backward is its adjoint: the sum over ranks of the gradient of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slices: int) -> Tensor:
        ctx.slices, world = slices, world_size()
        shares = [slices_of(rank, world, slices) for rank in range(world)]
        rows = [len(share) * len(x) // len(shares[rank()]) for share in shares]
        # Not every backend takes parts of different sizes: one slice, at most, is sent in vain.
        padding = x.new_zeros(max(rows) - len(x), *x.shape[1:])
        x = torch.cat([x, padding]) if len(padding) else x.contiguous()
        parts = [torch.empty_like(x) for _ in rows]
        dist.all_gather(parts, x)
        return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return own_rows(all_sum(gradient.clone(memory_format=torch.contiguous_format)), ctx.slices), None


def gather(x: Tensor, slices: int | None = None) -> Tensor:
    """Return the rows of all ranks in rank order, differentiable.

    Where every rank computes the same loss L of the gathered rows, each gets world * dL/dx. The mean over ranks that
    DistributedDataParallel takes cancels that factor for what lies before the gather, and changes nothing for what lies
    behind it (proxies, heads): every parameter gets dL/dp once. learner.py, which sums gradients itself, gathers rows
    that need none.

    Args:
        x: (b, ...) rows of this rank's slices.
        slices: S, of the global batch; None: one for each rank.

    Returns:
        (B, ...) rows.

    Raises:
        ValueError: Slices of the ranks are not of one shape and type, on every rank; or there are fewer than ranks.
    """
    if world_size() == 1:
        return x
    slices = slices or world_size()
    if slices < world_size():
        raise ValueError(f"gather: slices={slices}, but each of the {world_size()} ranks needs one")
    _require_equal_slices(x, slices)
    return _Gather.apply(x, slices)


class _Rows(NamedTuple):
    """What a rank is about to send: the number of slices of all ranks, an index in DTYPES, and a shape."""

    slices: int
    dtype: int
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.shape} {str(DTYPES[self.dtype]).removeprefix('torch.')} of {self.slices} slices"


DTYPES = sorted({dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}, key=str)
DIMENSIONS = 8  # of what is gathered, at most
_known: tuple[object, set[_Rows]] = None, set()  # a process group, and what its ranks have sent already


def _require_equal_slices(x: Tensor, slices: int) -> None:
    """Raise ValueError, on every rank and before any row is sent, where the ranks do not have equal slices.

    Gloo aborts processes that send unequal numbers of bytes. So ranks first tell each other type and shape, in a
    message of one size: on a processor at each call, as a rank may have sent a shape before where another has not. On a
    GPU the host would wait for it: there only what a rank has not sent before is told, and what ranks then mistake ends
    in NCCL's timeout.
    """
    global _known
    if _known[0] is not dist.group.WORLD:
        _known = dist.group.WORLD, set()
    own = _Rows(slices, DTYPES.index(x.dtype), tuple(x.shape))
    if x.is_cuda and own in _known[1]:
        return
    message = torch.tensor([slices, own.dtype, x.ndim, *x.shape, *[0] * (DIMENSIONS - x.ndim)], device=x.device)
    messages = [torch.empty_like(message) for _ in range(world_size())]
    dist.all_gather(messages, message)
    ranks = [_Rows(s, dtype, tuple(shape[:ndim])) for s, dtype, ndim, *shape in torch.stack(messages).tolist()]
    held = [len(slices_of(number, world_size(), slices)) for number in range(world_size())]
    equal = {(rows.slices, rows.dtype, len(rows.shape), *rows.shape[1:]) for rows in ranks}
    sizes = {rows.shape[0] / count for rows, count in zip(ranks, held, strict=True) if count and rows.shape}
    if not x.ndim or len(equal) > 1 or len(sizes) > 1 or any(size % 1 for size in sizes):
        listed = "; ".join(f"rank {number} has {rows}" for number, rows in enumerate(ranks))
        raise ValueError(f"gather needs slices of one shape and type on every rank: {listed}")
    _known[1].add(own)


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


def own_rows(x: Tensor, slices: int | None = None) -> Tensor:
    """Return the rows of a gathered x that come from this rank. slices: as of `gather`."""
    return x[own_columns(len(x), slices or world_size())]


def own_columns(batch: int, slices: int) -> slice:
    """Return which of the rows of a global batch are in this rank's slices."""
    own, size = slices_of(rank(), world_size(), slices), batch // slices
    return slice(own.start * size, own.stop * size)


class Merge(NamedTuple):
    """Two nodes of the tree that become one. A node is named by its first slice, and lies on the rank that holds it.

    Attributes:
        left, right: The nodes; the left one becomes the sum.
        to, source: The ranks that they lie on.
    """

    left: int
    right: int
    to: int
    source: int


def tree(slices: int, world: int) -> Iterator[list[Merge]]:
    """Yield the levels of the binary tree over slices: ((0 + 1) + (2 + 3)) + ((4 + 5) + 6) for seven of them.

    On level l the node k covers the slices k 2^l .. min((k + 1) 2^l, S) - 1. Which nodes are added, and in which order,
    depends on the slices alone; the ranks only say what is sent.
    """
    holder = [rank for rank in range(world) for _ in slices_of(rank, world, slices)]
    width = 1
    while width < slices:
        lefts = range(0, slices - width, 2 * width)
        yield [Merge(left, left + width, holder[left], holder[left + width]) for left in lefts]
        width *= 2


def tree_sum(parts: Sequence[Tensor], slices: int | None = None) -> Tensor:
    """Sum what all slices give along the tree: the same bits however many ranks the slices lie on.

    Args:
        parts: One for each slice of this rank, of one shape.
        slices: S, of all ranks; None: as many on every rank.

    Returns:
        The sum, on every rank, in memory of its own.
    """
    world = world_size()
    slices = slices or len(parts) * world
    if slices == 1:
        return parts[0].clone()
    if world > 1 and is_power_of_two(world) and is_power_of_two(slices):
        return _doubled_sum(parts)
    nodes, own = dict(zip(slices_of(rank(), world, slices), parts, strict=True)), rank()
    for level in tree(slices, world):
        sent = next((merge for merge in level if merge.source == own != merge.to), None)
        received = next((merge for merge in level if merge.to == own != merge.source), None)
        outgoing = (nodes.pop(sent.right), sent.to) if sent else None
        incoming = exchange(outgoing, (parts[0], received.source) if received else None)
        if received and incoming is not None:
            nodes[received.right] = incoming
        for merge in level:
            if merge.to == own:
                nodes[merge.left] = nodes[merge.left] + nodes.pop(merge.right)
    return broadcast(nodes.get(0, torch.empty_like(parts[0])), 0)


def _doubled_sum(parts: Sequence[Tensor]) -> Tensor:
    """Sum along the tree where all subtrees are alike: by a + b = b + a, each pair of ranks may add for itself."""
    while len(parts) > 1:
        parts = [left + right for left, right in zip(parts[::2], parts[1::2], strict=True)]
    (total,) = parts
    for level in range(world_size().bit_length() - 1):
        partner = rank() ^ (1 << level)
        other = exchange((total, partner), (total, partner))
        assert other is not None
        total = total + other
    return total


def is_power_of_two(number: int) -> bool:
    """Whether an integer >= 1 is 1, 2, 4, ..."""
    return number & (number - 1) == 0


def exchange(sent: tuple[Tensor, int] | None, received: tuple[Tensor, int] | None) -> Tensor | None:
    """Send a tensor to a rank, receive one from a rank, or both.

    Args:
        sent: The tensor and the rank that it goes to.
        received: A tensor like the one that comes, and the rank that it comes from.

    Returns:
        What has come; None where nothing was to come.
    """
    if not (sent or received):
        return None
    by_host = dist.get_backend() == "gloo"  # which sends nothing from the memory of a GPU
    messages, incoming = list[dist.P2POp](), None
    if sent:
        x = sent[0].contiguous()
        messages.append(dist.P2POp(dist.isend, x.cpu() if by_host else x, sent[1]))
    if received:
        incoming = torch.empty_like(received[0], device="cpu" if by_host else None)
        messages.append(dist.P2POp(dist.irecv, incoming, received[1]))
    for request in dist.batch_isend_irecv(messages):
        request.wait()
    return incoming.to(received[0].device) if received and incoming is not None else None


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


def all_max(x: Tensor) -> Tensor:
    """Take the largest x of all ranks, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x
