"""Views decoded by Ray Data on any node of the cluster, in the order of the plan (data.loader=ray)."""

import itertools
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

WINDOW = 512  # batches that one data set describes; the next is begun when it is used up
AHEAD = 4  # decoded batches held ready


class StreamedViews:
    """As Views, but for where the work is done. A row of the data set is one batch, and a block one row: Ray Data deals
    blocks, so that a batch never comes in pieces."""

    def __init__(self, views: Views):
        self.images, self.evaluation = views.images, views.evaluation
        self.held = ray.put(Views(replace(views.images, whole=None), views.evaluation, views.training))

    def batches(self, rows: Iterable[Rows], processes: int = 0) -> Iterator[Tensor]:
        """uint8 (b, 3, S, S), one for each entry of `rows`, in that order. processes: not used; see Views."""
        rest = iter(rows)
        while window := list(itertools.islice(rest, WINDOW)):
            items = [{"rows": [(sample, -1 if seed is None else seed) for sample, seed in batch]} for batch in window]
            data = ray.data.from_items(items, override_num_blocks=len(items))
            data.context.execution_options.preserve_order = True
            data.context.enable_progress_bars = False
            decoded = data.map(decode, fn_args=([self.held],), num_cpus=1)  # type: ignore[arg-type]
            for block in decoded.iter_batches(batch_size=None, prefetch_batches=AHEAD, batch_format="numpy"):
                yield from torch.from_numpy(np.stack(list(block["views"]))).unbind()


def decode(item: dict[str, Any], held: list[Any]) -> dict[str, np.ndarray]:
    """One batch, on some node. held: a reference to Views, in a list, as Ray would fetch a bare one for each task."""
    rows = [(int(sample), None if seed < 0 else int(seed)) for sample, seed in item["rows"]]
    return {"views": _unpacked(held[0]).batch(rows).numpy()}


@lru_cache(4)
def _unpacked(views: Any) -> Views:
    """Once in each decoding process; the table travels once to each node."""
    torch.set_num_threads(1)
    return ray.get(views)
