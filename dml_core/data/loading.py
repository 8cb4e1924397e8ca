"""Batches of pictures, decoded and augmented in the order of a plan, and their way to the device."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
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
    is_mirrored,
    shift,
    shift_maps,
)

Augmentation = Literal["crop", "shift", "none"]
Key = TypeVar("Key")
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
        return self.shifted(squares, rows).expand(-1, 3, -1, -1)

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
        crops = drawn_crops(rows, self.augmentation)

        def view(row: int) -> Tensor:
            return self.view(rows[row][0], None if crops is None else crops[row]).permute(1, 2, 0)

        views = each_readable(view, range(len(rows)))
        if self.augmentation != "shift":
            return views
        return [*self.shifted(torch.stack(views).permute(0, 3, 1, 2), rows).permute(0, 2, 3, 1)]

    def view(self, sample: int, numbers: np.ndarray | None) -> Tensor:
        """Return a picture's middle square or, given numbers (CROP_NUMBERS,), a random crop: uint8 (3, S, S)."""
        if numbers is None:
            return self.evaluation.transform(self.images.picture(sample, self.size))

        return self.part(sample, partial(crop_box, numbers), is_mirrored(numbers))

    def part(self, sample: int, box: Callable[[int, int], Box], mirrored: bool) -> Tensor:
        """Return a part of a picture (height, width) as a view, uint8 (3, S, S)."""
        view = self.resize(self.images.picture(sample, self.size, box))
        return view.flip(2) if mirrored else view

    def shifted(self, squares: Tensor, rows: Rows) -> Tensor:
        """Return pictures (b, C, S, S), changed at random where rows have seeds and that is the augmentation."""
        seeds = _seeds(rows)
        if not seeds or self.augmentation != "shift":
            return squares
        maps = torch.from_numpy(shift_maps(draw_uniform(seeds, SHIFT_NUMBERS), self.size))
        return shift(squares, send(maps, squares.device))


def drawn_crops(rows: Rows, augmentation: Augmentation) -> np.ndarray | None:
    """Return the numbers (b, CROP_NUMBERS) of the crops of a batch; None where nothing is cropped at random."""
    seeds = _seeds(rows)
    return draw_uniform(seeds, CROP_NUMBERS) if seeds and augmentation == "crop" else None


def each_readable(function: Callable[[Key], Item], keys: Iterable[Key]) -> list[Item]:
    """Map a function that reads a picture.

    Raises:
        BadPicture: Pictures cannot be read; the error names all of them.
    """
    results, bad = list[Item](), list[tuple[str, str]]()
    for key in keys:
        try:
            results.append(function(key))
        except BadPicture as error:
            bad += error.bad
    if bad:
        raise BadPicture(bad)
    return results


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
