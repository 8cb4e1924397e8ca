"""Views: transforms of pictures to uint8 tensors of one size. Random ones are seeded by the caller, view by view.

torchvision is imported where a random view is built: its import takes as long as torch's, and who only embeds pictures
does without.
"""

import math
import platform
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

MIN_CROP_AREA = 0.4  # share of the picture's area
MIN_CROP_RATIO = 3 / 4  # of the sides of a crop


class View(NamedTuple):
    """A transform of pictures.

    Attributes:
        transform: Maps uint8 (3, H, W) to uint8 (3, S, S).
        side: Pixels on the short side of the smallest picture that `transform` does not enlarge.
    """

    transform: nn.Module
    side: int


class MiddleSquare(nn.Module):
    """Crop the middle square of a picture (3, H, W). Before a resize, so that a thin strip stays small."""

    def forward(self, picture: Tensor) -> Tensor:
        height, width = picture.shape[1:]
        side = min(height, width)
        top, left = round((height - side) / 2), round((width - side) / 2)
        return picture[:, top : top + side, left : left + side]


class Resize(nn.Module):
    """Resize a picture (3, H, W) to `size` x `size` pixels: bilinear, antialiased, with the bits of torchvision's."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        # Where torch has no fast kernel for uint8, torchvision resizes in float32.
        capability, machine = torch.backends.cpu.get_cpu_capability(), platform.machine()
        self.in_uint8 = capability in ("AVX2", "AVX512") or machine in ("aarch64", "arm64")

    def forward(self, picture: Tensor) -> Tensor:
        size = [self.size, self.size]
        if [*picture.shape[1:]] == size:
            return picture
        pixels = picture[None] if self.in_uint8 else picture[None].float()
        resized = interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)[0]
        return resized if self.in_uint8 else resized.round_().to(picture.dtype)


def evaluation_view(size: int) -> View:
    """Return the view for evaluation: the middle square of a picture, `size` pixels wide."""
    return View(nn.Sequential(MiddleSquare(), Resize(size)), size)


def training_view(name: str, size: int) -> View:
    """Return a random view for training.

    Args:
        name: crop: random resized crop and flip, for photographs. shift: small shifts, turns and scales that keep the
            reading direction, for characters and other signs. none: the evaluation view.
        size: Width and height in pixels.

    Raises:
        ValueError: The name is unknown.
    """
    if name == "none":
        return evaluation_view(size)
    from torchvision.transforms import v2

    if name == "shift":
        shift = v2.RandomAffine(degrees=8, translate=(0.08, 0.08), scale=(0.9, 1.1), shear=6)
        return View(v2.Compose([evaluation_view(size).transform, shift]), size)
    if name == "crop":
        ratio = (MIN_CROP_RATIO, 1 / MIN_CROP_RATIO)
        crop = v2.RandomResizedCrop(size, scale=(MIN_CROP_AREA, 1.0), ratio=ratio, antialias=True)
        side = math.ceil(size / math.sqrt(MIN_CROP_AREA * MIN_CROP_RATIO))
        return View(v2.Compose([crop, v2.RandomHorizontalFlip()]), side)
    raise ValueError(f"augmentation {name!r} is not one of crop, shift, none")


def apply_seeded(transform: nn.Module, picture: Tensor, seed: int) -> Tensor:
    """Apply a random transform to a picture (3, H, W) by a seed. The state of torch's generator stays as it was."""
    generator = torch.default_generator  # which the transforms draw from; torch.manual_seed would look for GPUs, too
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        return transform(picture)
    finally:
        generator.set_state(state)
