"""Views: pictures as uint8 tensors of one size, for training changed at random.

What is random is a function of numbers in [0, 1) that the caller draws for each view (sampling.draw_uniform).
"""

import math
import platform
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from dml_core.data.pictures import Box

MIN_CROP_AREA = 0.4  # share of the picture's area
MIN_CROP_RATIO = 3 / 4  # of the sides of a crop
CROP_TRIES = 10
CROP_NUMBERS = 2 * CROP_TRIES + 3  # area and ratio of each try, place (down, right), flip

MAX_TURN, MAX_SHEAR = 8, 6  # degrees
MAX_MOVE, MAX_SCALE = 0.08, 0.1  # shares of the side
SHIFT_NUMBERS = 5  # turn, move (right, down), scale, shear


class View(NamedTuple):
    """A transform of pictures.

    Attributes:
        transform: Maps uint8 (3, H, W) to uint8 (3, S, S).
        side: Pixels on the short side of the smallest picture that `transform` does not enlarge.
    """

    transform: nn.Module
    side: int


def middle_square(height: int, width: int) -> Box:
    """Return the middle square of a picture of so many pixels."""
    side = min(height, width)
    return Box(round((height - side) / 2), round((width - side) / 2), side, side)


class MiddleSquare(nn.Module):
    """Crop the middle square of a picture (3, H, W). Before a resize, so that a thin strip stays small."""

    def forward(self, picture: Tensor) -> Tensor:
        top, left, height, width = middle_square(*picture.shape[1:])
        return picture[:, top : top + height, left : left + width]


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


def crop_box(numbers: np.ndarray, height: int, width: int) -> Box:
    """Return the part of a picture that a random crop takes, distributed as torchvision's RandomResizedCrop has it.

    The area is uniform, the ratio of the sides log-uniform, the place uniform. What does not fit is drawn again, and
    after ten tries it is the middle of the picture, with the nearest ratio that is allowed.

    Args:
        numbers: (CROP_NUMBERS,) in [0, 1); the last one is the flip's.
        height: Of the picture, pixels.
        width: Of the picture, pixels.
    """
    *tries, down, right, _ = numbers.tolist()
    for area, ratio in zip(tries[::2], tries[1::2], strict=True):
        area = height * width * (MIN_CROP_AREA + (1 - MIN_CROP_AREA) * area)
        ratio = MIN_CROP_RATIO ** (1 - 2 * ratio)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(down * (height - h + 1)), int(right * (width - w + 1)), h, w)
    h, w = min(height, round(width / MIN_CROP_RATIO)), min(width, round(height / MIN_CROP_RATIO))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def is_mirrored(numbers: np.ndarray) -> bool:
    """Whether a random crop is a mirror image. numbers: (CROP_NUMBERS,), see crop_box."""
    return bool(numbers[-1] < 0.5)


def shift_maps(numbers: np.ndarray, size: int) -> np.ndarray:
    """Return the random small shifts, turns, scales and shears that keep the reading direction of signs.

    Args:
        numbers: (B, SHIFT_NUMBERS) in [0, 1).
        size: Side of the pictures, pixels.

    Returns:
        (B, 2, 3) float64: where a pixel (x, y, 1) of a view, as seen from the middle, lies in the picture (x, y).
        Views are moved by whole pixels.
    """
    turn, right, down, scale, shear = (2 * numbers - 1).T
    turn, shear = np.radians(MAX_TURN * turn), np.radians(MAX_SHEAR * shear)
    move = np.rint(MAX_MOVE * size * np.stack([right, down], 1))
    # A view is its picture sheared, turned, scaled and moved; the map goes the other way.
    cos, sin, slope = np.cos(turn), np.sin(turn), np.tan(shear)
    inverse = np.stack([cos - sin * slope, sin + cos * slope, -sin, cos], 1).reshape(-1, 2, 2)
    inverse /= (1 + MAX_SCALE * scale)[:, None, None]
    return np.concatenate([inverse, -(inverse * move[:, None]).sum(2, keepdims=True)], 2)


def shift(pictures: Tensor, maps: Tensor) -> Tensor:
    """Sample a batch of pictures at mapped places: the nearest pixel, black outside.

    A pixel of a view is computed from its own map alone, in float64 and by single operations, so that its bits depend
    neither on the batch nor on the device.

    Args:
        pictures: uint8 (B, C, S, S).
        maps: (B, 2, 3) float64, see shift_maps.

    Returns:
        uint8 (B, C, S, S).
    """
    size = pictures.shape[-1]
    places = torch.arange(size, device=pictures.device, dtype=maps.dtype) - (size - 1) / 2
    of_column = maps[:, :, 0, None] * places  # (B, 2, S)
    of_row = maps[:, :, 1, None] * places + (maps[:, :, 2, None] + (size - 1) / 2)
    x, y = (of_row[:, :, :, None] + of_column[:, :, None, :]).round_().long().unbind(1)  # (B, S, S)
    is_inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    pixel = torch.where(is_inside, y * size + x, 0).flatten(1)[:, None]
    sampled = pictures.flatten(2).gather(2, pixel.expand(-1, pictures.shape[1], -1)).view_as(pictures)
    return sampled.mul_(is_inside[:, None])
