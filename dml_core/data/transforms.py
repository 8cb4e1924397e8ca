"""Pictures to uint8 tensors of one size. What is random is seeded by the caller, view by view."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.functional import center_crop

LEAST_AREA, FLATTEST = 0.4, 3 / 4  # of a random crop: its share of the picture, its sides


class View(NamedTuple):
    """side: of the smallest picture from which `transform` need not enlarge anything, in pixels of its short side."""

    transform: nn.Module
    side: int


class MiddleSquare(nn.Module):
    """The largest square in the middle of a picture (3, H, W). Before a resize, so that a thin strip stays small."""

    def forward(self, picture: Tensor) -> Tensor:
        return center_crop(picture, [min(picture.shape[1:])])


def evaluation(size: int) -> View:
    """The middle square of the picture."""
    return View(v2.Compose([MiddleSquare(), v2.Resize((size, size), antialias=True)]), size)


def training(name: str, size: int) -> View:
    """`crop`: random resized crop and flip, for photographs. `shift`: small shifts, turns and scales that keep the
    reading direction, for characters and other signs. `none`: the evaluation view."""
    if name == "none":
        return evaluation(size)
    if name == "shift":
        shift = v2.RandomAffine(degrees=8, translate=(0.08, 0.08), scale=(0.9, 1.1), shear=6)
        return View(v2.Compose([evaluation(size).transform, shift]), size)
    if name == "crop":
        crop = v2.RandomResizedCrop(size, scale=(LEAST_AREA, 1.0), ratio=(FLATTEST, 1 / FLATTEST), antialias=True)
        least = math.ceil(size / math.sqrt(LEAST_AREA * FLATTEST))
        return View(v2.Compose([crop, v2.RandomHorizontalFlip()]), least)
    raise ValueError(f"augmentation {name!r} is not one of crop, shift, none")


def seeded(transform: nn.Module, picture: Tensor, seed: int) -> Tensor:
    """The view of a picture (3, H, W) that belongs to a seed, whatever was drawn before; the caller's random state is
    left as it was."""
    generator = torch.default_generator  # what the transforms draw from; torch.manual_seed would seek devices, too
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        return transform(picture)
    finally:
        generator.set_state(before)
