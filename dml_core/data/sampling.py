"""The plan of global P x K batches: a function of (labels, seed, epoch) alone, sliced by rank.

No process draws for itself. Each one computes the same plan and takes its own rows, so that the sequence of global
batches, and with it the loss, does not depend on the number of workers.
"""

from collections.abc import Iterator, Sequence

import numpy as np

Rows = list[tuple[int, int | None]]  # (sample, view seed); seed None: nothing is augmented

PLAN, VIEW, STEP = 0, 1, 2  # streams of random numbers, as parts of the keys of `derive_seed`

# SplitMix64 (Steele, Lea and Flood 2014): its counter's increment, and shifts and factors of its mixing function.
INCREMENT = np.uint64(0x9E3779B97F4A7C15)
MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def derive_seed(*key: int) -> int:
    """Return a 62-bit seed for a key of integers >= 0. Distinct keys give independent streams."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(2))


def draw_uniform(seeds: Sequence[int], count: int) -> np.ndarray:
    """Draw numbers uniform in [0, 1), for many seeds at once: a row depends on its own seed alone.

    Row i holds the first numbers of SplitMix64, begun at the mixed seed i, so that seeds may follow each other.

    Args:
        seeds: B integers, 0 <= seed < 2^64.
        count: Numbers of a seed.

    Returns:
        (B, count) float64, multiples of 2^-53.
    """
    counters = _mix(np.array(seeds, np.uint64))[:, None] + INCREMENT * np.arange(1, count + 1, dtype=np.uint64)
    return (_mix(counters) >> np.uint64(11)) * 2.0**-53


def _mix(numbers: np.ndarray) -> np.ndarray:
    """Map 64-bit integers one to one to integers that look random; an array, as scalars would warn of overflows."""
    for shift, factor in MIXING:
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return numbers


class BatchPlan:
    """Global batches of `classes` x `images`, every class equally often.

    Within an epoch a class's images are dealt from a shuffled deck, which is shuffled anew only when it is used up; a
    class with fewer than `images` images therefore repeats some within a batch.

    Args:
        labels: (N,) integers, one a sample.
        classes: P distinct classes in a batch.
        images: K rows of a class in a batch.
        seed: Seed of the plan.
        steps: Batches in an epoch; None: as many rows as the set has, N // (P K) batches, at least one.

    Raises:
        ValueError: There are fewer than `classes` classes.
    """

    def __init__(self, labels: np.ndarray, classes: int, images: int, seed: int, steps: int | None = None):
        self.order = np.argsort(labels, kind="stable")
        self.counts = np.bincount(labels)
        self.starts = np.cumsum(self.counts) - self.counts
        if classes > len(self.counts):
            raise ValueError(f"batch.classes={classes}: the training set has only {len(self.counts)} classes")
        self.classes, self.images, self.seed = classes, images, seed
        self.steps = steps or max(1, len(labels) // (classes * images))

    def epoch(self, epoch: int) -> np.ndarray:
        """Return the sample indices (steps, P K) of an epoch, rows of one class side by side."""
        rng = np.random.default_rng((self.seed, PLAN, epoch))
        batches_per_round = len(self.counts) // self.classes
        rounds = -(-self.steps // batches_per_round)
        classes = np.stack([rng.permutation(len(self.counts)) for _ in range(rounds)])
        classes = classes[:, : batches_per_round * self.classes].reshape(-1, self.classes)[: self.steps]
        deck = [np.empty(0, np.int64)] * len(self.counts)
        plan = np.empty((self.steps, self.classes, self.images), np.int64)
        for step, batch_classes in enumerate(classes):
            for position, label in enumerate(batch_classes):
                while len(deck[label]) < self.images:
                    shuffled = rng.permutation(self.order[self.starts[label] :][: self.counts[label]])
                    in_deck = np.isin(shuffled, deck[label])  # these come last: no image twice while there are others
                    deck[label] = np.concatenate([deck[label], shuffled[~in_deck], shuffled[in_deck]])
                plan[step, position], deck[label] = deck[label][: self.images], deck[label][self.images :]
        return plan.reshape(self.steps, -1)

    def rows(self, epoch: int, columns: slice = slice(None)) -> "EpochRows":
        """Return the rows of an epoch's batches. columns: those of one rank, which follow each other; all by default.

        The view seed depends on the place in the epoch, not on the sample, so that a sample which comes twice in an
        epoch is augmented in two ways.
        """
        plan = self.epoch(epoch)
        places = np.arange(plan.size).reshape(plan.shape)
        return EpochRows(plan[:, columns], places[:, columns], derive_seed(self.seed, VIEW, epoch))


class EpochRows:
    """The rows of one rank, as Rows of one step after the other.

    Args:
        samples: (steps, b) sample indices.
        places: (steps, b) places in the epoch.
        seed: The view seed of a row is `seed` + its place.
    """

    def __init__(self, samples: np.ndarray, places: np.ndarray, seed: int):
        self.samples, self.places, self.seed = samples, places, seed

    def after(self, step: int) -> "EpochRows":
        """Return the rows that remain after so many steps."""
        return EpochRows(self.samples[step:], self.places[step:], self.seed)

    def __iter__(self) -> Iterator[Rows]:
        for samples, places in zip(self.samples, self.places, strict=True):
            yield list(zip(samples.tolist(), (self.seed + places).tolist(), strict=True))


def one_of_each_class(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return a mask (N,) of one sample of each class, drawn by `seed`."""
    order = np.random.default_rng(seed).permutation(len(labels))
    mask = np.zeros(len(labels), bool)
    mask[order[np.unique(labels[order], return_index=True)[1]]] = True
    return mask


def blocks(rows: int, size: int, rank: int, world: int, batch: int) -> Iterator[Rows]:
    """Yield the batches of one rank, when blocks of a set are dealt to ranks in turn.

    Args:
        rows: Samples in the set.
        size: Samples in a block.
        rank: This process.
        world: How many processes there are.
        batch: Samples in a batch, at most.
    """
    for start in range(rank * size, rows, world * size):
        end = min(start + size, rows)
        for first in range(start, end, batch):
            yield [(i, None) for i in range(first, min(first + batch, end))]
