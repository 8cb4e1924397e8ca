"""How the embeddings of each class vary: estimated over the whole training set, corrected by similar classes.

Fu et al., "Intra-class Adaptive Augmentation with Neighbor Correction for Deep Metric Learning", IEEE TMM 2022.
For class k with n_k embeddings: mean mu_k, variance V_k = E[(z - mu_k)^2]; running update with momentum m and the
number a_k of earlier embeddings: w = max(n_k / (n_k + a_k), 1 - m), or 0 where n_k = 0;
  V <- (1-w) V + w V_new + w (1-w) (mu - mu_new)^2,  mu <- (1-w) mu + w mu_new,  a <- a + n.
Correction: V_k <- (1-alpha_k) V_k + alpha_k [(1-gamma) V_nb(k) + gamma V_glob].

But:
- Each worker sums over its own shard, and all-reduces add up the sums. The published code holds N x C x D numbers,
  or loops over the classes with all embeddings in one place.
- What is summed is first rounded to multiples of one power of two, so small that all sums of a class are exact in
  float64 (Demmel and Nguyen, "Fast Reproducible Floating-Point Summation", ARITH 2013): the estimate has the same bits
  in whatever order, batches and shards the set comes. As that power depends on the largest number, embeddings are kept
  until the end of an update.
- A class with one sample has a mean as well (the published code leaves it at zero, so that its neighbors are wrong).
- Distances are scaled to [0, 1] over the real candidates of a row. The published code has its masking constant in the
  row, which makes every scaled distance about 0.
- alpha reaches n_k = tau, as in the paper; the published code stops before it.
- Above `SAMPLE_SIZE` candidates the least and the greatest distance of variances are those to the neighbors and to
  evenly spaced candidates, at least half as many, which saves half of the time. All else is exact.
- The full covariance is an option of ours; a distance between two is the Frobenius norm.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dml_core.gather import all_max, all_sum
from dml_core.retrieval.neighbors import leave_out

CHUNK = 2**17  # numbers: a chunk of embeddings in float64 stays in the cache
VARIANCE_CHUNK = 2**22  # numbers: the outer products of a chunk
PRODUCT_BITS = 22  # of the two integers that a number is for a full covariance
PRODUCT_ROWS = 2**9  # of a chunk: float64 holds the sums of products of such integers
SAMPLE_SIZE = 2**14  # candidates


class Tiles(NamedTuple):
    """How much of the correction is computed at a time.

    Attributes:
        rows: Of a tile of the class-to-class distances.
        columns: Of it.
        numbers: The variances of the neighbors of some classes.
    """

    rows: int
    columns: int
    numbers: int


# Type of device -> its tiles: 4 MiB stay in a processor's cache, 512 MiB keep all of a GPU busy.
TILES = {"cpu": Tiles(256, 2**12, 2**22), "cuda": Tiles(2**12, 2**15, 2**25)}


def tiles_of(device: torch.device) -> Tiles:
    """Return the tiles that suit a device."""
    return TILES["cpu" if device.type == "cpu" else "cuda"]


class ClassVariation(nn.Module):
    """Running mean and variance of the embeddings of each class.

    `update` takes a whole shard at once; `begin`, any number of `add` and `finish` take it in batches. All ranks must
    call `finish` (or `update`), also those whose shard is empty. Memory, until then: this rank's shard.

    Args:
        num_classes: C.
        dim: D.
        momentum: m of the running update.
        covariance: diag (variances) or full (covariance matrices).

    Attributes:
        mean: (C, D).
        variance: (C, D), or (C, D, D) for full covariances.
        count: (C,) how many embeddings of the class have been added in all updates.
        size: (C,) how many there were in the last update that had any.

    Raises:
        ValueError: `covariance` is neither diag nor full.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor
    size: Tensor

    def __init__(self, num_classes: int, dim: int, momentum: float = 0.2, covariance: str = "diag") -> None:
        super().__init__()
        if covariance not in ("diag", "full"):
            raise ValueError(f"covariance must be diag or full, not {covariance!r}")
        self.momentum, self.full = momentum, covariance == "full"
        self.register_buffer("mean", torch.zeros(num_classes, dim))
        self.register_buffer("variance", torch.zeros(num_classes, dim, *([dim] if self.full else [])))
        self.register_buffer("count", torch.zeros(num_classes))
        self.register_buffer("size", torch.zeros(num_classes))

    def update(self, z: Tensor, labels: Tensor) -> None:
        """Update the statistics by a set of which each rank has a shard.

        Args:
            z: (n, D) raw embeddings of this rank's shard.
            labels: (n,) their classes.
        """
        self.begin()
        self.add(z, labels)
        self.finish()

    def begin(self) -> None:
        """Start an update."""
        self.batches: list[tuple[Tensor, Tensor]] = []

    def add(self, z: Tensor, labels: Tensor) -> None:
        """Take a batch of embeddings z (b, D) and their classes (b,), which are kept as they are until `finish`."""
        if len(labels):
            self.batches.append((z.detach(), labels))

    @torch.no_grad()
    def finish(self) -> None:
        """End an update: sum 1, x and x^2 of x = z - center over the ranks' sets, and update the statistics."""
        batches, self.batches = self.batches, []
        center = self.mean.double().mean(0)  # the same on all ranks
        n = torch.zeros_like(self.count, dtype=torch.float64)
        for _, labels in batches:
            n += labels.bincount(minlength=len(n))
        all_sum(n)
        exponent = exponent_above(batches, center)
        # A sum of n numbers below 2^exponent is exact if they are multiples of 2^(exponent - 52) n.
        bits = 52 - int(n.max()).bit_length()
        first = torch.zeros_like(self.mean, dtype=torch.float64)
        second = ProductSums(self.variance, exponent) if self.full else SquareSums(self.variance, 2 * exponent - bits)
        shift = rounding_shift(exponent - bits)
        z_shift = shift - center
        center = shift - z_shift  # a multiple, too
        chunk = first.new_empty(second.rows, first.shape[1])
        for z, labels in chunks(batches, second.rows):
            x = chunk[: len(z)].copy_(z).add_(z_shift).sub_(shift)  # z - center, rounded
            first.index_add_(0, labels, x)
            second.add(x, labels)
        all_sum(first)
        all_sum(second.sums)
        block = max(1, CHUNK // self.variance[0].numel())  # the update takes several times the memory of its classes
        for start in range(0, len(n), block):
            self._update(slice(start, start + block), center, n, first, second)
        self.count.add_(n)
        self.size.copy_(torch.where(n > 0, n, self.size))

    def _update(
        self, rows: slice, center: Tensor, n: Tensor, first: Tensor, second: "SquareSums | ProductSums"
    ) -> None:
        """Update mean and variance of the classes `rows` by the sums of `finish`."""
        n, earlier = n[rows, None], self.count[rows, None].double()
        old = self.mean[rows].double()
        mean = first[rows] / n.clamp_min(1)  # of x
        step = (mean + center).sub_(old)
        weight = (n / (n + earlier).clamp_min(1)).clamp_min(1 - self.momentum) * (n > 0)
        w = weight[..., None] if self.full else weight
        within = second.variance(rows, n.clamp_min(1), mean)
        between = step[:, :, None] * step[:, None] if self.full else step.square()
        self.variance[rows] = torch.lerp(self.variance[rows].double(), within, w).add_(between.mul_(w * (1 - w)))
        self.mean[rows] = old.add_(step.mul_(weight))


class SquareSums:
    """Sums of squares by class, the same in any order: all are multiples of one power of two.

    Args:
        like: (C, D), of the shape and on the device of the sums.
        exponent: Squares are rounded to multiples of 2^exponent.

    Attributes:
        rows: Embeddings to add at a time.
    """

    def __init__(self, like: Tensor, exponent: int):
        self.exponent, self.rows = exponent, max(1, CHUNK // like.shape[1])
        self.sums = torch.zeros_like(like, dtype=torch.float64)

    def add(self, x: Tensor, labels: Tensor) -> None:
        """Add rows x (b, D) of classes `labels` (b,). x: used up."""
        self.sums.index_add_(0, labels, round_to(x.square_(), self.exponent))

    def variance(self, rows: slice, n: Tensor, mean: Tensor) -> Tensor:
        """Return the variances (R, D) of some classes, given their sizes n (R, 1) and means (R, D)."""
        return (self.sums[rows] / n).sub_(mean.square()).clamp_min_(0)


class ProductSums:
    """Sums of outer products x x^T by class, the same in any order.

    x = (2^22 h + m) 2^(e - 44) with integers h and m. So x x^T = (2^22 h h^T + h m^T + m h^T) 2^(2 e - 66), without
    m m^T, which is below 2^-46 of the largest square. Matrix products of the integers are exact in a float64 within a
    chunk, and in an int64 beyond, for 2^19 samples of a class.

    Args:
        like: (C, D, D), of the shape and on the device of the sums.
        exponent: e, such that all |x| are below 2^e.

    Attributes:
        rows: Embeddings to add at a time, at most.
    """

    def __init__(self, like: Tensor, exponent: int):
        self.exponent, self.rows = exponent, max(1, min(PRODUCT_ROWS, VARIANCE_CHUNK // like.shape[1] ** 2))
        self.sums = torch.zeros(2, *like.shape, dtype=torch.int64, device=like.device)

    def add(self, x: Tensor, labels: Tensor) -> None:
        """Add rows x (b, D) of classes `labels` (b,)."""
        labels, order = labels.sort(stable=True)
        x = x[order].nan_to_num_(0, 0, 0)  # what is not finite shows in the sums of x
        high = round_to(x.clone(), self.exponent - PRODUCT_BITS)
        low = round_to(x.sub_(high), self.exponent - 2 * PRODUCT_BITS)
        high.mul_(power_of_two(PRODUCT_BITS - self.exponent))
        low.mul_(power_of_two(2 * PRODUCT_BITS - self.exponent))
        classes, inverse, sizes = labels.unique_consecutive(return_inverse=True, return_counts=True)
        position = torch.arange(len(x), device=x.device) - (sizes.cumsum(0) - sizes)[inverse]
        h, m = x.new_zeros(2, len(classes), int(sizes.max()), x.shape[1])
        h[inverse, position], m[inverse, position] = high, low
        product = h.mT @ m
        self.sums[0].index_add_(0, classes, (h.mT @ h).long())
        self.sums[1].index_add_(0, classes, (product + product.mT).long())

    def variance(self, rows: slice, n: Tensor, mean: Tensor) -> Tensor:
        """Return the covariances (R, D, D) of some classes, given their sizes n (R, 1) and means (R, D)."""
        total = self.sums[0, rows].double().mul_(2.0**PRODUCT_BITS).add_(self.sums[1, rows])
        half = power_of_two(self.exponent)  # the whole may be beyond a float64
        total.mul_(2.0 ** (-3 * PRODUCT_BITS)).mul_(half).mul_(half)
        return total.div_(n[..., None]).sub_(mean[:, :, None] * mean[:, None])


def exponent_above(batches: list[tuple[Tensor, Tensor]], center: Tensor) -> int:
    """Return an e such that all finite |z - center| on all ranks are below 2^e: the same however the set is dealt."""
    largest = center.new_zeros(())
    for z, _ in batches:
        low, high = z.aminmax()
        largest = largest.maximum(high).maximum(-low)
    if not largest.isfinite():
        finite = [z.nan_to_num(0, 0, 0).abs().amax() for z, _ in batches]
        largest = torch.stack(finite).amax().double()
    return math.frexp(float(all_max(largest) + center.nan_to_num(0, 0, 0).abs().amax()))[1]


def chunks(batches: list[tuple[Tensor, Tensor]], rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows of batches in chunks of about so many: small ones are joined, large ones split."""
    joined: list[tuple[Tensor, Tensor]] = []
    for number, batch in enumerate(batches, 1):
        joined.append(batch)
        if sum(len(labels) for _, labels in joined) >= rows or number == len(batches):
            z, labels = joined[0] if len(joined) == 1 else (torch.cat(tensors) for tensors in zip(*joined))
            yield from zip(z.split(rows), labels.split(rows))
            joined = []


def round_to(x: Tensor, exponent: int) -> Tensor:
    """Round float64 x in place to multiples of 2^exponent, where |x| < 2^(exponent + 51)."""
    shift = rounding_shift(exponent)
    return x.add_(shift).sub_(shift)


def rounding_shift(exponent: int) -> float:
    """Return a number so large that a float64 near it has no bits below 2^exponent: adding it rounds."""
    return 1.5 * power_of_two(52 + exponent)


def power_of_two(exponent: int) -> float:
    """Return 2^exponent, or the nearest that is far from the ends of float64."""
    return math.ldexp(1, max(-1000, min(1000, exponent)))


def neighbor_weight(count: Tensor, beta: float = 0.1, tau: float = 40) -> Tensor:
    """Return alpha, the share of a class's variation that comes from its neighbors.

    alpha_k = 1 / (1 + log(1 + beta (n_k - 1))) for n_k <= tau, else 0.

    Args:
        count: (C,) sizes n of the classes.
        beta: How fast the share falls with the size.
        tau: Larger classes are not corrected.

    Returns:
        (C,) alpha, in [0, 1]; 1 for a class of one sample or none.
    """
    n = count.double().clamp_min(1)
    alpha = 1 / (1 + torch.log1p(beta * (n - 1)))
    return torch.where(n <= tau, alpha, 0).to(count.dtype if count.is_floating_point() else torch.get_default_dtype())


@torch.no_grad()
def neighbor_correction(
    mean: Tensor,
    variance: Tensor,
    count: Tensor,
    neighbors: int = 25,
    beta: float = 0.1,
    gamma: float = 0.1,
    tau: float = 40,
) -> Tensor:
    """Correct the variance of each class by those of similar classes.

    Only classes of two samples or more can be neighbors; where there are none, nothing is corrected. Time: O(C^2 D).
    Memory beside the result: O(C D), twice that of `mean` or `variance`, and some tiles (`TILES`), on a GPU 1 GiB.

    Args:
        mean: (C, D).
        variance: (C, D) or (C, D, D).
        count: (C,) size of each class.
        neighbors: How many of the nearest classes correct a class.
        beta: As in `neighbor_weight`.
        gamma: Weight of the mean variance of all classes against that of the neighbors.
        tau: As in `neighbor_weight`.

    Returns:
        The corrected variances, shaped like `variance`.
    """
    alpha = neighbor_weight(count.double(), beta, tau)[:, None]
    candidates, corrected_classes = torch.where(count > 1)[0], torch.where(alpha[:, 0] > 0)[0]
    corrected = variance.clone().flatten(1)
    if len(candidates) == 0 or len(corrected_classes) == 0:
        return corrected.view_as(variance)
    location, spread, n = mean.square(), variance.flatten(1), count.double()
    size = max(1, tiles_of(mean.device).numbers // ((neighbors + 1) * spread.shape[1]))
    overall = sum(n[part] @ spread[part].double() for part in candidates.split(size)) / n[candidates].sum()
    near_all, farthest = nearest_classes(location, corrected_classes, candidates, neighbors)
    sample = candidates[:: -(-len(candidates) // SAMPLE_SIZE)].contiguous()
    most_alike, least_alike = nearest_classes(spread, corrected_classes, sample, 1)

    found = corrected_classes, near_all, farthest, most_alike, least_alike
    for rows, near, far_location, alike, far_spread in zip(*(x.split(size) for x in found)):
        kept, near_spread = near != rows[:, None], spread[near]
        location_distance = (location[near] - location[rows, None]).norm(dim=2)
        spread_distance = (near_spread - spread[rows, None]).norm(dim=2)
        least = (spread[alike] - spread[rows, None]).norm(dim=2)
        distance = unit_scale(location_distance, kept, None, far_location).square()
        distance += unit_scale(spread_distance, kept, least, far_spread).square()
        weights = n[near] * torch.exp(-distance / 2) * kept
        total = weights.sum(1, keepdim=True)
        local = torch.einsum("rk, rkd -> rd", (weights / total).to(near_spread.dtype), near_spread)
        blend = (1 - gamma) * torch.where(total > 0, local, overall) + gamma * overall
        corrected[rows] = torch.lerp(spread[rows].double(), blend, alpha[rows]).to(corrected.dtype)
    return corrected.view_as(variance)


def nearest_classes(x: Tensor, rows: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the nearest other candidates of some classes, and how far the farthest is, by products of tiles.

    Args:
        x: (C, D) a point of each class.
        rows: (Q,) classes.
        candidates: (S,) classes to search among, ascending.
        k: How many to find.

    Returns:
        (Q, min(k, S)) the nearest candidates, nearest first; the class itself in places for which there are too few.
        (Q,) squared distance to the farthest.
    """
    size, columns, _ = tiles_of(x.device)
    y = x[candidates]
    center = y.mean(0)  # distances stay, rounding errors shrink
    norms = y.sub_(center).square().sum(1)
    near_all, farthest = [], []
    for part in rows.split(size):
        query = x[part] - center
        own = torch.searchsorted(candidates, part)[:, None]
        own.masked_fill_(candidates[own.clamp(max=len(candidates) - 1)] != part[:, None], -1)
        tiles = []
        for offset in range(0, len(candidates), columns):
            tile = slice(offset, offset + columns)
            # Minus the squared distance, but for the squared norm of the query.
            similarity = torch.addmm(norms[tile], query, y[tile].T, beta=-1, alpha=2)
            far = similarity.amin(1, keepdim=True)
            leave_out(similarity, own, offset)
            best = similarity.topk(min(k, similarity.shape[1])) if k > 1 else similarity.max(1, keepdim=True)
            tiles.append((best.values, best.indices + offset, far))
        values, positions, far = (torch.cat(parts, 1) for parts in zip(*tiles))
        best = values.topk(min(k, values.shape[1]))
        near = candidates[positions.gather(1, best.indices)]
        near_all.append(torch.where(best.values > -torch.inf, near, part[:, None]))
        farthest.append(query.square().sum(1) - far.amin(1))
    return torch.cat(near_all), torch.cat(farthest)


def unit_scale(distance: Tensor, kept: Tensor, least: Tensor | None, farthest: Tensor) -> Tensor:
    """Scale distances to [0, 1], from the least to the greatest distance of a row's candidates.

    Args:
        distance: (R, K) distances of some candidates.
        kept: (R, K) bool, which of them count.
        least: (R, 1) least distance of all candidates; None: that candidate is among the kept ones.
        farthest: (R,) greatest squared distance of all candidates.

    Returns:
        (R, K) float64.
    """
    low = distance.masked_fill(~kept, torch.inf).amin(1, keepdim=True)
    if least is not None:
        low = low.minimum(least)
    high = distance.masked_fill(~kept, 0).amax(1, keepdim=True).maximum(farthest[:, None].clamp_min(0).sqrt())
    span = (high - low).double()
    return torch.where(span > 0, (distance - low) / span, 0)
