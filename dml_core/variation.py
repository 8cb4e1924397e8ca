"""How the embeddings of each class vary: estimated over the whole training set, corrected by similar classes.

Fu et al., "Intra-class Adaptive Augmentation with Neighbor Correction for Deep Metric Learning", IEEE TMM 2022.
For class k with n_k embeddings: mean mu_k, variance V_k = E[(z - mu_k)^2]; running update with momentum m and the
number a_k of earlier embeddings: w = max(n_k / (n_k + a_k), 1 - m), or 0 where n_k = 0;
  V <- (1-w) V + w V_new + w (1-w) (mu - mu_new)^2,  mu <- (1-w) mu + w mu_new,  a <- a + n.
Correction: V_k <- (1-alpha_k) V_k + alpha_k [(1-gamma) V_nb(k) + gamma V_glob].

But:
- Each worker sums over its own shard, and all-reduces add up the sums. The published code holds N x C x D numbers,
  or loops over the classes with all embeddings in one place.
- Numbers are summed as integers at fixed places (Demmel and Nguyen, "Parallel Reproducible Summation", IEEE Trans.
  Computers 2015), so that the estimate has the same bits in whatever order, batches and shards the set comes.
- A class with one sample has a mean as well (the published code leaves it at zero, so that its neighbors are wrong).
- Distances are scaled to [0, 1] over the real candidates of a row. The published code has its masking constant in the
  row, which makes every scaled distance about 0.
- alpha reaches n_k = tau, as in the paper; the published code stops before it.
- Above `BRUTE_FORCE_LIMIT` candidates Faiss finds the neighbors, and the ends of the scale are taken over the neighbors
  and about `SAMPLE_SIZE` evenly spaced candidates.
- The full covariance is an option of ours; a distance between two is the Frobenius norm.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dml_core.gather import all_max, all_sum

CHUNK = 2**16  # numbers: a chunk of embeddings in float64 stays in the cache
BLOCK = 2**21  # numbers: a block of the class-to-class distances
VARIANCE_CHUNK = 2**22  # numbers: the variances of a block's neighbors, or the outer products of a chunk
ROWS_OF_PRODUCTS = 2**9  # of a chunk: float64 holds the sums of their integers' products
BRUTE_FORCE_LIMIT = 2**14  # candidates: above, Faiss searches
EXACT_SEARCH_LIMIT = 2**16  # candidates: above, Faiss searches an inverted file, which may miss some
SAMPLE_SIZE = 2**11  # candidates


class ClassVariation(nn.Module):
    """Running mean and variance of the embeddings of each class.

    `update` takes a whole shard at once; `begin`, any number of `add` and `finish` take it in batches. All ranks must
    call `finish` (or `update`), also those whose shard is empty.

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
        """Start an update: set the sums to zero."""
        self.center = self.mean.double().mean(0)  # the same on all ranks
        self.n = torch.zeros_like(self.count, dtype=torch.float64)
        self.first = ExactSum(self.mean.shape, self.mean.device)
        self.second = (ExactOuterSum if self.full else ExactSum)(self.variance.shape, self.mean.device)

    @torch.no_grad()
    def add(self, z: Tensor, labels: Tensor) -> None:
        """Add 1, x and x^2 of x = z - center to the sums of the classes. z: (b, D); labels: (b,)."""
        if len(labels) == 0:
            return
        self.n.index_add_(0, labels, self.n.new_ones(()).expand(len(labels)))
        if self.full:
            labels, order = labels.sort(stable=True)
            z = z[order]
        rows = min(ROWS_OF_PRODUCTS, VARIANCE_CHUNK // z.shape[1] ** 2) if self.full else CHUNK // z.shape[1]
        for x, y in zip(z.split(max(1, rows)), labels.split(max(1, rows))):
            x = x - self.center
            exponent = exponent_above(x)
            self.first.add(y, x, exponent)
            if self.full:
                self.second.add(y, x, exponent)
            else:
                self.second.add(y, x.square_(), 2 * exponent)

    @torch.no_grad()
    def finish(self) -> None:
        """End an update: add up the sums of all ranks, and update the statistics by them.

        Raises:
            ValueError: A class has more samples than the sums hold.
        """
        all_sum(self.n)
        if self.n.max() > self.second.MOST:
            raise ValueError(f"a class has {int(self.n.max())} samples; its sums hold {self.second.MOST} at most")
        self.first.add_up_ranks()
        self.second.add_up_ranks()
        block = max(1, CHUNK // self.variance[0].numel())
        for start in range(0, len(self.n), block):
            self._update(slice(start, start + block))
        self.count.add_(self.n)
        self.size.copy_(torch.where(self.n > 0, self.n, self.size))
        del self.center, self.n, self.first, self.second

    def _update(self, rows: slice) -> None:
        """Update mean and variance of some classes: of few at a time, as it takes several times their memory."""
        n, old = self.n[rows, None], self.count[rows, None].double()
        shift = self.first.total(rows).div_(n.clamp_min(1))
        step = self.center + shift - self.mean[rows]
        weight = (n / (n + old).clamp_min(1)).clamp_min(1 - self.momentum) * (n > 0)
        w = weight[..., None] if self.full else weight
        within = self.second.total(rows).div_(n.clamp_min(1)[..., None] if self.full else n.clamp_min(1))
        if self.full:
            within.sub_(shift[:, :, None] * shift[:, None])
            between = step[:, :, None] * step[:, None]
        else:
            within.sub_(shift.square_()).clamp_min_(0)
            between = step.square()
        self.variance[rows] = torch.lerp(self.variance[rows].double(), within, w).add_(between.mul_(w * (1 - w)))
        self.mean[rows].add_(step.mul_(weight))


class ExactSum:
    """Sums of numbers by class with the same bits in any order, and however the numbers are dealt to ranks.

    A number v becomes integers at places that do not depend on it, v = sum_i h_i 2^(WIDTH (top - i)), |h_i| <= 2^25,
    and those at each place are summed by themselves: a float64 holds the sum of 2^28. `top` is where the largest number
    so far begins, so that no number has anything above it, and three places reach 2^51 times lower. As `top` rises, the
    lowest place is dropped, from what has been summed as from what is yet to come: the order does not matter.

    Infinities and NaN make the sum NaN.

    Args:
        shape: (C, D) of the sums.
        device: Where they lie.
    """

    WIDTH: ClassVar = 26  # bits between two places
    PLACES: ClassVar = 3
    FACTORS: ClassVar = 1  # how many integers are multiplied to what is summed
    MOST: ClassVar = 2**28  # samples of a class
    DTYPE: ClassVar = torch.float64

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self.sums = torch.zeros(self.PLACES, *shape, dtype=self.DTYPE, device=device)
        self.top = -1022 // self.WIDTH + 1  # for zeros; a power of two that float64 has, as is its inverse

    def add(self, labels: Tensor, v: Tensor, exponent: int) -> None:
        """Add rows v (b, D), |v| < 2^exponent, to the sums of their classes `labels` (b,)."""
        self.raise_top(exponent // self.WIDTH)
        for total, h in zip(self.sums, integers(v, self.top, self.WIDTH)):
            total.index_add_(0, labels, h)

    def raise_top(self, top: int) -> None:
        """Move the sums so that they begin at `top`, if that is higher."""
        top = min(top, 1022 // self.WIDTH)
        if top <= self.top:
            return
        steps = self.FACTORS * (top - self.top)
        for place in reversed(range(self.PLACES)):
            self.sums[place] = self.sums[place - steps] if place >= steps else 0
        self.top = top

    def add_up_ranks(self) -> None:
        """Make the sums those of all ranks."""
        self.raise_top(int(all_max(torch.tensor(self.top, device=self.sums.device))))
        all_sum(self.sums)

    def total(self, rows: slice) -> Tensor:
        """Return the sums of some classes as float64."""
        total = self.sums[-1, rows].to(torch.float64, copy=True)
        for place in reversed(range(self.PLACES - 1)):
            total.mul_(math.ldexp(1, -self.WIDTH)).add_(self.sums[place, rows])
        for _ in range(self.FACTORS):
            total.mul_(math.ldexp(1, self.WIDTH * self.top))
        return total


class ExactOuterSum(ExactSum):
    """As ExactSum, sums of outer products x x^T by class.

    x = (h + m 2^-22 + l 2^-44) 2^(22 top). Products of the integers are summed by place, where a sample adds no more
    than 3 2^42: by float64 matrix products within a chunk, which is small enough for them to be exact, and by int64
    beyond. The error of a sample is at most 2^-42 of the largest square.

    Where x is not finite, its sums are arbitrary; those of x itself show it.

    Args:
        shape: (C, D, D) of the sums.
        device: Where they lie.
    """

    WIDTH: ClassVar = 22
    PLACES: ClassVar = 4
    FACTORS: ClassVar = 2
    MOST: ClassVar = 2**19
    DTYPE: ClassVar = torch.int64

    def add(self, labels: Tensor, v: Tensor, exponent: int) -> None:
        """Add rows v (b, D), |v| < 2^exponent, b <= ROWS_OF_PRODUCTS, sorted by their classes `labels` (b,)."""
        self.raise_top(exponent // self.WIDTH)
        classes, inverse, sizes = labels.unique_consecutive(return_inverse=True, return_counts=True)
        position = torch.arange(len(v), device=v.device) - (sizes.cumsum(0) - sizes)[inverse]
        padded = v.new_zeros(3, len(classes), int(sizes.max()), v.shape[1])
        for part, integer in zip(padded, integers(v, self.top, self.WIDTH)):
            part[inverse, position] = integer
        for total, product in zip(self.sums, products(*padded), strict=True):
            total.index_add_(0, classes, product.long())


def products(h: Tensor, m: Tensor, low: Tensor) -> Iterator[Tensor]:
    """Yield the sums over samples, by place, of (h + m + low) (h + m + low)^T, but for low low^T.

    Args:
        h, m, low: (P, n, D) integers of the samples of P classes at three places.

    Yields:
        (P, D, D) four times.
    """
    yield h.mT @ h
    yield (product := h.mT @ m) + product.mT
    yield (product := h.mT @ low) + product.mT + m.mT @ m
    yield (product := m.mT @ low) + product.mT


def exponent_above(x: Tensor) -> int:
    """Return the least e such that all numbers of x are below 2^e, but for those that are not finite."""
    largest = float(x.abs().amax())
    if not math.isfinite(largest):
        largest = float(x.nan_to_num(0, 0, 0).abs().amax())
    return math.frexp(largest)[1] if largest else -(2**11)


def integers(v: Tensor, top: int, width: int) -> Iterator[Tensor]:
    """Yield the integers h_0, h_1, ... of v = sum_i h_i 2^(width (top - i)), each the nearest to what is left of v.

    Without end, and each overwrites the one before. A v of no more than half of 2^(width (top + 1)) has a zero there,
    so that its integers at a place are the same from any top.
    """
    rest = v * math.ldexp(1, -width * top)
    whole = torch.empty_like(rest)
    while True:
        yield torch.round(rest, out=whole)
        rest.sub_(whole).mul_(math.ldexp(1, width))


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
    """Correct the variance of each class by those of similar classes. Memory: O(C D).

    Only classes of two samples or more can be neighbors; where there are none, nothing is corrected.

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
    candidates = torch.where(count > 1)[0]
    if len(candidates) == 0:
        return variance.clone()
    location, spread, n = mean.square(), variance.flatten(1), count.double()
    overall = sum(n[part] @ spread[part].double() for part in candidates.split(BRUTE_FORCE_LIMIT)) / n[candidates].sum()
    use_brute_force = len(candidates) <= BRUTE_FORCE_LIMIT
    reference = candidates if use_brute_force else candidates[:: len(candidates) // SAMPLE_SIZE]
    location_distances, spread_distances = (squared_distances_to(x[reference]) for x in (location, spread))
    find_nearest = None if use_brute_force else faiss_search(location, candidates)

    corrected = spread.clone()
    rows_at_once = min(BLOCK // len(reference), VARIANCE_CHUNK // ((neighbors + 1) * spread.shape[1]))
    for rows in torch.where(alpha[:, 0] > 0)[0].split(max(1, rows_at_once)):
        to_locations, to_spreads = location_distances(location[rows]), spread_distances(spread[rows])
        if find_nearest is None:
            near = candidates[to_locations.topk(min(neighbors + 1, len(candidates)), largest=False).indices]
        else:
            near = find_nearest(location[rows], neighbors + 1)
        kept = (near >= 0) & (near != rows[:, None])
        kept &= kept.cumsum(1) <= neighbors  # one more is searched than is kept, as one may be the class itself
        near_spread = spread[near]
        location_distance = (location[near] - location[rows, None]).norm(dim=2)
        spread_distance = (near_spread - spread[rows, None]).norm(dim=2)
        to_other_spreads = to_spreads.masked_fill(reference == rows[:, None], torch.inf)
        distance = unit_scale(location_distance, kept, None, to_locations.amax(1)).square()
        distance += unit_scale(spread_distance, kept, to_other_spreads.amin(1), to_spreads.amax(1)).square()
        weights = n[near] * torch.exp(-distance / 2) * kept
        total = weights.sum(1, keepdim=True)
        local = torch.einsum("rk, rkd -> rd", (weights / total).to(near_spread.dtype), near_spread)
        blend = (1 - gamma) * torch.where(total > 0, local, overall) + gamma * overall
        corrected[rows] = torch.lerp(spread[rows].double(), blend, alpha[rows]).to(corrected.dtype)
    return corrected.view_as(variance)


def squared_distances_to(y: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that maps x (R, D) to its squared distances (R, S) to y (S, D), by one matrix product."""
    center = y.mean(0)
    y = y - center
    norms = y.square().sum(1)
    return lambda x: torch.addmm(norms, x - center, y.T, alpha=-2).add_((x - center).square().sum(1, keepdim=True))


def unit_scale(distance: Tensor, kept: Tensor, lowest: Tensor | None, highest: Tensor) -> Tensor:
    """Scale distances to [0, 1], from the least to the greatest distance of a row's candidates.

    Args:
        distance: (R, K) distances of some candidates.
        kept: (R, K) bool, which of them count.
        lowest: (R,) least squared distance of all candidates; None: that candidate is among the kept ones.
        highest: (R,) greatest squared distance of all candidates.

    Returns:
        (R, K) float64.
    """
    low = distance.masked_fill(~kept, torch.inf).amin(1)
    high = distance.masked_fill(~kept, 0).amax(1).maximum(highest.clamp_min(0).sqrt())
    if lowest is not None:
        low = low.minimum(lowest.clamp_min(0).sqrt())
    span = (high - low).double()[:, None]
    return torch.where(span > 0, (distance - low[:, None]) / span, 0)


def faiss_search(location: Tensor, candidates: Tensor) -> Callable[[Tensor, int], Tensor]:
    """Build an index of the candidates' rows of `location` (C, D).

    Args:
        location: (C, D) points of all classes.
        candidates: (S,) classes to search among.

    Returns:
        A function of queries (R, D) and k that returns the nearest candidates (R, k), -1 where there are fewer.
    """
    import faiss

    cells = int(4 * len(candidates) ** 0.5)
    is_exact = len(candidates) < EXACT_SEARCH_LIMIT
    index: Any = faiss.index_factory(location.shape[1], "Flat" if is_exact else f"IVF{cells},Flat")
    if not index.is_trained:
        index.nprobe = max(16, cells // 64)
        index.train(location[candidates].float().cpu().numpy())
    for part in candidates.split(BRUTE_FORCE_LIMIT):
        index.add(location[part].float().cpu().numpy())

    def find_nearest(queries: Tensor, k: int) -> Tensor:
        positions = torch.from_numpy(index.search(queries.float().cpu().numpy(), k)[1]).to(candidates.device)
        return torch.where(positions >= 0, candidates[positions], -1)

    return find_nearest
