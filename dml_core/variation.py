"""How the embeddings of each class vary: estimated over the whole training set, corrected by similar classes.

Fu et al., "Intra-class Adaptive Augmentation with Neighbor Correction for Deep Metric Learning", IEEE TMM 2022.
For class k with n_k embeddings: mean mu_k, variance V_k = E[(z - mu_k)^2]; running update with momentum m and the
number a_k of earlier embeddings: w = max(n_k / (n_k + a_k), 1 - m), or 0 where n_k = 0;
  V <- (1-w) V + w V_new + w (1-w) (mu - mu_new)^2,  mu <- (1-w) mu + w mu_new,  a <- a + n.
Correction: V_k <- (1-alpha_k) V_k + alpha_k [(1-gamma) V_nb(k) + gamma V_glob].

But:
- Each worker sums over its own shard, and one all-reduce of (C, 1 + 2D) numbers makes the sums exact. The published
  code holds N x C x D numbers, or loops over the classes with all embeddings in one place.
- A class with one sample has a mean as well (the published code leaves it at zero, so that its neighbors are wrong).
- Distances are scaled to [0, 1] over the real candidates of a row. The published code has its masking constant in the
  row, which makes every scaled distance about 0.
- alpha reaches n_k = tau, as in the paper; the published code stops before it.
- Above `BRUTE_FORCE_LIMIT` candidates Faiss finds the neighbors, and the ends of the scale are taken over the neighbors
  and about `SAMPLE_SIZE` evenly spaced candidates.
- The full covariance is an option of ours; a distance between two is the Frobenius norm.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dml_core.gather import all_sum

CHUNK = 2**17  # numbers: a chunk of embeddings in float64 stays in the cache
BLOCK = 2**21  # numbers: a block of the class-to-class distances
VARIANCE_CHUNK = 2**22  # numbers: the variances of a block's neighbors, or the outer products of a chunk
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
        parts = [self.count, self.mean, self.variance]
        self.center = self.mean.double().mean(0)  # the same on all ranks
        self.sums = torch.zeros(sum(part.numel() for part in parts), dtype=torch.float64, device=self.mean.device)
        views = self.sums.split([part.numel() for part in parts])
        self.n, self.first, self.second = (view.view_as(part) for view, part in zip(views, parts))

    @torch.no_grad()
    def add(self, z: Tensor, labels: Tensor) -> None:
        """Add 1, x and x^2 of x = z - center to the sums of the classes. z: (b, D); labels: (b,)."""
        self.n.index_add_(0, labels, self.n.new_ones(()).expand(len(labels)))
        if self.full:
            labels, order = labels.sort(stable=True)
            z = z[order]
        rows = max(1, VARIANCE_CHUNK // z.shape[1] ** 2 if self.full else CHUNK // z.shape[1])
        for x, y in zip(z.split(rows), labels.split(rows)):
            x = x - self.center
            self.first.index_add_(0, y, x)
            if self.full:
                self.second.index_add_(0, *outer_products(x, y))
            else:
                self.second.index_add_(0, y, x.square_())

    @torch.no_grad()
    def finish(self) -> None:
        """End an update: add up the sums of all ranks, and update the statistics by them."""
        all_sum(self.sums)
        n, old = self.n[:, None], self.count.double()[:, None]
        shift = self.first.div_(n.clamp_min(1))
        step = self.center + shift - self.mean
        weight = (n / (n + old).clamp_min(1)).clamp_min(1 - self.momentum) * (n > 0)
        w = weight[..., None] if self.full else weight
        within = self.second.div_(n.clamp_min(1)[..., None] if self.full else n.clamp_min(1))
        if self.full:
            within.sub_(shift[:, :, None] * shift[:, None])
            between = step[:, :, None] * step[:, None]
        else:
            within.sub_(shift.square_()).clamp_min_(0)
            between = step.square()
        self.variance.copy_(torch.lerp(self.variance.double(), within, w).add_(between.mul_(w * (1 - w))))
        self.mean.add_(step.mul_(weight))
        self.count.add_(self.n)
        self.size.copy_(torch.where(self.n > 0, self.n, self.size))
        del self.center, self.sums, self.n, self.first, self.second


def outer_products(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum x x^T by class.

    Args:
        x: (b, D), sorted by label.
        labels: (b,) ascending.

    Returns:
        The classes that are present, (P,), and their sums, (P, D, D).
    """
    classes, inverse, sizes = labels.unique_consecutive(return_inverse=True, return_counts=True)
    position = torch.arange(len(x), device=x.device) - (sizes.cumsum(0) - sizes)[inverse]
    padded = x.new_zeros(len(classes), int(sizes.max()), x.shape[1])
    padded[inverse, position] = x
    return classes, padded.mT @ padded


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
