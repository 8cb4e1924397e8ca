"""Views decoded by tasks on any node of the cluster, in the order of the plan (data.loader=ray)."""

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from dml_core.data.loading import Views
from dml_core.data.sampling import Rows
from dml_core.gather import world_size

LEAST_AHEAD = 4  # batches

warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # it is Ray's, and we only read it


class StreamedViews:
    """Views that are decoded by Ray's tasks on any node, a whole batch a task; asked for like Views.

    Every CPU has one task to do and one to come, and no more, whatever the pace of the training: what is ready lies in
    Ray's memory.
    """

    def __init__(self, views: Views):
        self.images = views.images
        self.reference = ray.put(Views(replace(views.images, whole=None), views.size, views.augmentation))

    def batches(self, rows: Iterable[Rows], processes: int = 0, pinned: bool = False) -> Iterator[Tensor]:
        """Yield uint8 (b, 3, S, S), one for each entry of `rows`, in that order. The others are for Views."""
        ahead, limit = deque[Any](), max(LEAST_AHEAD, int(2 * ray.cluster_resources()["CPU"] / world_size()))
        for batch in rows:
            ahead.append(decode.remote(batch, [self.reference]))
            if len(ahead) > limit:
                yield _fetched_batch(ahead.popleft())
        while ahead:
            yield _fetched_batch(ahead.popleft())


@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")  # on all nodes, also from within a trial's own share of one
def decode(rows: Rows, views: list[ray.ObjectRef]) -> np.ndarray:
    """Decode one batch to (b, S, S, 3). views: a reference, in a list, as Ray would fetch a bare one for each task."""
    return _fetched(views[0]).batch(rows).permute(0, 2, 3, 1).numpy()


def _fetched_batch(batch: ray.ObjectRef) -> Tensor:
    return torch.from_numpy(ray.get(batch)).permute(0, 3, 1, 2)


@lru_cache(4)
def _fetched(views: ray.ObjectRef) -> Views:
    """Fetch views once in each decoding process; they travel once to each node."""
    torch.set_num_threads(1)
    return ray.get(views)
