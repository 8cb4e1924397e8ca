"""How embeddings lie: how far each class spreads, how many directions are used, how near pairs of a class are.

Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
Wang and Isola, "Understanding contrastive representation learning through alignment and uniformity on the
hypersphere", ICML 2020. Both of their measures are better where they are lower.

Legend: N embeddings, D dimensions, C classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 1024  # rows that are compared with all others at a time


class ClassDistances(NamedTuple):
    """Distances of embeddings to the means of their classes, and of these to each other.

    Attributes:
        place: (N,) which of the classes, in the order of their labels, an embedding is of.
        sizes: (C,) embeddings of each class.
        to_own: (N,) distance of each embedding to the mean of its class.
        to_next: (C,) distance of each mean to the nearest other one; 0 where there is one class.
    """

    place: Tensor
    sizes: Tensor
    to_own: Tensor
    to_next: Tensor

    def mean_by_class(self, values: Tensor) -> Tensor:
        """Return the mean over each class, (C,), of values (N,)."""
        return values.new_zeros(len(self.sizes)).index_add_(0, self.place, values) / self.sizes


def distances_to_means(z: Tensor, labels: Tensor) -> ClassDistances:
    """Measure how far embeddings (N, D) lie from the means of their classes (N,), and these from each other."""
    classes, place, sizes = labels.unique(return_inverse=True, return_counts=True)
    means = z.new_zeros(len(classes), z.shape[1]).index_add_(0, place, z) / sizes[:, None]
    nearest = [torch.cdist(block, means).topk(min(2, len(means)), largest=False) for block in means.split(BLOCK)]
    to_next = torch.cat([found.values[:, -1] for found in nearest])
    return ClassDistances(place, sizes, (z - means[place]).norm(dim=1), to_next)


def spectrum(z: Tensor) -> Tensor:
    """Return the singular values of centred embeddings (N, D) as shares of their sum, the largest first, float64."""
    values = torch.linalg.svdvals((z - z.mean(0)).double())
    return values / values.sum()


def effective_rank(shares: Tensor) -> float:
    """Return exp of the entropy of a spectrum: D where all directions are used alike, 1 where a single one is."""
    return torch.special.entr(shares).sum().exp().item()


def alignment(distances: ClassDistances) -> float:
    """Return the mean squared distance over all pairs of a class: 0 where each class is a point.

    Those of a class of n embeddings sum to n times the sum of their squared distances to the mean.
    """
    within = (distances.sizes[distances.place] * distances.to_own.square()).double().sum()
    pairs = (distances.sizes * (distances.sizes - 1)).sum() / 2
    return (within / pairs).item()


def uniformity(z: Tensor, t: float = 2.0) -> float:
    """Return log mean exp(-t d^2) over all pairs of unit embeddings (N, D): 0 where all are one point.

    Args:
        z: (N, D), N at least 2.
        t: How fast a pair counts less with its squared distance d^2.
    """
    norm = z.square().sum(1)
    total = -torch.tensor(len(z), dtype=torch.float64, device=z.device)  # an embedding and itself are no pair
    for block, length in zip(z.split(BLOCK), norm.split(BLOCK), strict=True):
        square = (length[:, None] + norm - 2 * block @ z.T).clamp_min_(0)
        total += torch.exp(-t * square).double().sum()
    return torch.log(total / (len(z) * (len(z) - 1))).item()
