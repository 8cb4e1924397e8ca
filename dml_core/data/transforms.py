"""Pictures to uint8 tensors of one size. What is random is seeded by the caller, view by view."""

import torch
from torch import Tensor
from torchvision.transforms import v2


def evaluation(size: int) -> v2.Transform:
    """The whole picture, its short side to `size`, the middle square of it."""
    return v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])


def training(name: str, size: int) -> v2.Transform:
    """`crop`: random resized crop and flip, for photographs. `shift`: small shifts, turns and scales that keep the
    reading direction, for characters and other signs. `none`: the evaluation view."""
    if name == "none":
        return evaluation(size)
    if name == "shift":
        return v2.Compose(
            [v2.Resize(size), v2.RandomAffine(degrees=8, translate=(0.08, 0.08), scale=(0.9, 1.1), shear=6)]
        )
    if name == "crop":
        return v2.Compose([v2.RandomResizedCrop(size, scale=(0.4, 1.0), antialias=True), v2.RandomHorizontalFlip()])
    raise ValueError(f"augmentation {name!r} is not one of crop, shift, none")


def seeded(transform: v2.Transform, picture: Tensor, seed: int) -> Tensor:
    """The view of a picture (3, H, W) that belongs to a seed, whatever was drawn before; the caller's random state is
    left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transform(picture)
