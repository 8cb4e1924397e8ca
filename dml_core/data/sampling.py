"""The plan of global P x K batches: a function of (labels, seed, epoch) alone, sliced by rank.

No process draws for itself. Each one computes the same plan and takes its own rows, so that the sequence of global
batches, and with it the loss, does not know how many workers there are.
"""

from collections.abc import Iterator

import numpy as np

Rows = list[tuple[int, int | None]]  # (sample, view seed); no seed: nothing is augmented

PLAN, VIEW, STEP = 0, 1, 2  # what a stream of random numbers is for; see `derive_seed`


def derive_seed(*key: int) -> int:
    """A 62-bit seed from integers >= 0. Distinct keys give independent streams."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(2))


class BatchPlan:
    """Global batches of `classes` x `images`, every class equally often.

    Within an epoch a class's images are dealt from a shuffled deck, which is shuffled anew only when it is used up; a
    class with fewer than `images` images therefore repeats some within a batch.

    labels: (N,) int, one a sample.  classes: P distinct classes a batch.  images: K rows a class.
    steps: batches an epoch; None covers as many rows as the set has, N // (P K), at least one.
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
        """(steps, P K) sample indices, rows of one class side by side."""
        rng = np.random.default_rng((self.seed, PLAN, epoch))
        batches_a_round = len(self.counts) // self.classes
        rounds = -(-self.steps // batches_a_round)
        chosen = np.stack([rng.permutation(len(self.counts)) for _ in range(rounds)])
        chosen = chosen[:, : batches_a_round * self.classes].reshape(-1, self.classes)[: self.steps]
        deck = [np.empty(0, np.int64)] * len(self.counts)
        plan = np.empty((self.steps, self.classes, self.images), np.int64)
        for step, row in enumerate(chosen):
            for place, label in enumerate(row):
                while len(deck[label]) < self.images:
                    fresh = rng.permutation(self.order[self.starts[label] :][: self.counts[label]])
                    held = np.isin(fresh, deck[label])  # these come last: no image twice while there are others
                    deck[label] = np.concatenate([deck[label], fresh[~held], fresh[held]])
                plan[step, place], deck[label] = deck[label][: self.images], deck[label][self.images :]
        return plan.reshape(self.steps, -1)

    def slices(self, epoch: int, rank: int, world: int) -> "Slices":
        """This rank's rows of each batch, (sample, view seed) pairs, made when they are asked for.

        The seed is that of the place in the epoch, not of the sample, so that a sample which comes twice in an epoch is
        augmented in two ways. Ranks take consecutive rows: gathering in rank order restores the global batch.
        """
        plan = self.epoch(epoch)
        size = plan.shape[1] // world
        mine = slice(rank * size, (rank + 1) * size)
        places = np.arange(plan.size).reshape(plan.shape)
        return Slices(plan[:, mine], places[:, mine], derive_seed(self.seed, VIEW, epoch))


class Slices:
    """samples (steps, b), and the view seeds `seed + places`, as Rows of one step after the other."""

    def __init__(self, samples: np.ndarray, places: np.ndarray, seed: int):
        self.samples, self.places, self.seed = samples, places, seed

    def after(self, step: int) -> "Slices":
        """What is left when so many steps are done."""
        return Slices(self.samples[step:], self.places[step:], self.seed)

    def __iter__(self) -> Iterator[Rows]:
        for samples, places in zip(self.samples, self.places, strict=True):
            yield list(zip(samples.tolist(), (self.seed + places).tolist(), strict=True))


def one_of_each_class(labels: np.ndarray, seed: int) -> np.ndarray:
    """(N,) mask of one sample of each class, drawn by `seed`."""
    order = np.random.default_rng(seed).permutation(len(labels))
    mask = np.zeros(len(labels), bool)
    mask[order[np.unique(labels[order], return_index=True)[1]]] = True
    return mask


def blocks(rows: int, size: int, rank: int, world: int, batch: int) -> Iterator[Rows]:
    """Consecutive blocks of a set of `rows` samples, dealt to ranks in turn, in batches of at most `batch` samples."""
    for start in range(rank * size, rows, world * size):
        end = min(start + size, rows)
        for first in range(start, end, batch):
            yield [(i, None) for i in range(first, min(first + batch, end))]
