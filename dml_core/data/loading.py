"""Batches of pictures, decoded and augmented in the order of a plan, and their way to the device."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dml_core.data.datasets import LabelledImages
from dml_core.data.pictures import BadPicture, Box
from dml_core.data.sampling import Rows, draw_uniform
from dml_core.data.transforms import (
    CROP_NUMBERS,
    SHIFT_NUMBERS,
    Resize,
    crop_box,
    evaluation_view,
    shift,
    shift_maps,
)

Augmentation = Literal["crop", "shift", "none"]
Item = TypeVar("Item")


class Views(Dataset[Tensor]):
    """Views of labelled pictures. The key of a view is (sample, seed); seed None: nothing is random.

    Args:
        images: The pictures.
        size: S, width and height of views in pixels.
        augmentation: What a seed changes. crop: random resized crop and flip, for photographs. shift: small shifts,
            turns and scales that keep the reading direction, for characters and other signs. none: nothing.
        resident: (., S, S) gray pictures that `images` is a part of, on the device that views are made on; None: they
            are decoded one by one, on the processor.
    """

    def __init__(
        self,
        images: LabelledImages,
        size: int,
        augmentation: Augmentation = "none",
        resident: Tensor | None = None,
    ):
        self.images, self.size, self.augmentation, self.resident = images, size, augmentation, resident
        self.evaluation, self.resize = evaluation_view(size), Resize(size)

    def batch(self, rows: Rows) -> Tensor:
        """Return the views of a batch, uint8 (b, 3, S, S); see __getitems__ for errors."""
        if self.resident is None:
            return torch.stack(self.__getitems__(rows)).permute(0, 3, 1, 2)
        places = np.array([sample for sample, _ in rows])
        if self.images.places is not None:
            places = self.images.places[places]
        squares = self.resident.index_select(0, send(torch.from_numpy(places), self.resident.device))[:, None]
        return self._shifted(squares, rows).expand(-1, 3, -1, -1)

    def batches(self, rows: Iterable[Rows], processes: int = 0, pinned: bool = False) -> Iterator[Tensor]:
        """Yield one batch for each entry of `rows`, in that order.

        Args:
            rows: The keys of each batch's views.
            processes: How many processes decode, beside this one; 0: this one does.
            pinned: Whether batches are to lie in pinned memory, from which copies to a GPU go on by themselves.
        """
        if self.resident is not None:
            yield from map(self.batch, rows)
            return
        loader = DataLoader(self, batch_sampler=rows, num_workers=processes, pin_memory=pinned)
        for batch in loader:
            yield batch.permute(0, 3, 1, 2)

    def __getitems__(self, rows: Rows) -> list[Tensor]:
        """Return the views of a batch, each uint8 (S, S, 3), as DataLoader asks for them.

        Raises:
            BadPicture: Pictures cannot be read; the error names all of them.
        """
        seeds, views, bad = _seeds(rows), list[Tensor](), list[tuple[str, str]]()
        crops = draw_uniform(seeds, CROP_NUMBERS) if seeds and self.augmentation == "crop" else None
        for number, (sample, _) in enumerate(rows):
            try:
                if crops is None:
                    view = self.evaluation.transform(self.images.picture(sample, self.size))
                else:
                    view = self._crop(sample, crops[number])
            except BadPicture as error:
                bad += error.bad
            else:
                views.append(view.permute(1, 2, 0))
        if bad:
            raise BadPicture(bad)
        if crops is None and seeds and self.augmentation == "shift":
            return [*self._shifted(torch.stack(views).permute(0, 3, 1, 2), rows).permute(0, 2, 3, 1)]
        return views

    def _crop(self, sample: int, numbers: np.ndarray) -> Tensor:
        """Return a random crop of a picture, or its mirror image, uint8 (3, S, S). numbers: (CROP_NUMBERS,)."""

        def part(height: int, width: int) -> Box:
            return crop_box(numbers, height, width)

        view = self.resize(self.images.picture(sample, self.size, part))
        return view.flip(2) if numbers[-1] < 0.5 else view

    def _shifted(self, squares: Tensor, rows: Rows) -> Tensor:
        """Return pictures (b, C, S, S), changed at random where rows have seeds and that is the augmentation."""
        seeds = _seeds(rows)
        if not seeds or self.augmentation != "shift":
            return squares
        maps = torch.from_numpy(shift_maps(draw_uniform(seeds, SHIFT_NUMBERS), self.size))
        return shift(squares, send(maps, squares.device))


def _seeds(rows: Rows) -> list[int]:
    """Return the seeds of a batch's views; none where nothing is random."""
    seeds = [seed for _, seed in rows if seed is not None]
    assert len(seeds) in (0, len(rows)), "all views of a batch have a seed, or none has"
    return seeds


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device. A copy to a GPU waits for nothing, as the tensor is pinned, and goes by its turn."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def sent_ahead(batches: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yield batches on a device. A GPU has the next one copied, by a stream of its own, while it computes on one."""
    if device.type != "cuda":
        yield from batches
        return
    copies = torch.cuda.Stream(device)

    def copy(batch: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(copies):
            return send(batch, device), copies.record_event()

    for batch, arrived in one_ahead(map(copy, batches)):
        computing = torch.cuda.current_stream(device)
        computing.wait_event(arrived)
        batch.record_stream(computing)  # its memory is not given to the next copy before it is read
        yield batch


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield items in their order, each when the next one is there, too."""
    for item, _ in itertools.pairwise(itertools.chain(items, [None])):
        assert item is not None
        yield item
