"""Decode pictures of every kind to uint8 tensors (3, H, W), upright, in RGB; unreadable ones are refused by name."""

import importlib
import importlib.util
import io
import logging
import struct
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # a set's lists are read without either
    import PIL.Image
    from torch import Tensor

MAX_PIXELS = 100_000_000
WHITE = (255, 255, 255)
# In all these ways Pillow's decoders fail on damaged files.
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, ArithmeticError, struct.error)
ORIENTATION, ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and the values with which rows are columns

# Packages that teach Pillow further formats, where they are installed, and the function that makes them do so, if any.
PLUGINS = {"pillow_heif": "register_heif_opener", "pillow_avif": None, "pillow_jxl": None}
# What Pillow opens and cannot decode by itself, and drawings and data that are no pictures of a thing.
NO_PICTURES = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS"}


@cache
def load_plugins() -> None:
    """Have Pillow open the formats of all its plugins that are installed."""
    for name, register in PLUGINS.items():
        if importlib.util.find_spec(name) is None:
            continue
        try:
            plugin = importlib.import_module(name)
            if register:
                getattr(plugin, register)()
        except Exception:  # a plugin that does not fit this Pillow fails in ways of its own
            logging.getLogger(__name__).exception("Pillow's plugin %s cannot be used", name)


@cache
def picture_endings() -> frozenset[str]:
    """Return the endings of the files that Pillow can open, in lower case, with their dot."""
    from PIL import Image

    Image.preinit()  # the usual formats come first: files are tried in the order in which formats are registered
    Image.init()
    load_plugins()
    kinds = {*Image.OPEN, "MPO"} - NO_PICTURES  # MPO files are opened as JPEGs
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in kinds)


class BadPicture(ValueError):
    """Pictures that cannot be read.

    Args:
        bad: (name, reason) of each.
    """

    def __init__(self, bad: list[tuple[str, str]]):
        self.bad = bad
        listed = "; ".join(f"{name}: {reason}" for name, reason in bad[:20])
        more = f"; and {len(bad) - 20} more" if len(bad) > 20 else ""
        super().__init__(f"unreadable picture{'s' * (len(bad) > 1)} {listed}{more}")

    def __reduce__(self) -> tuple[type, tuple[list[tuple[str, str]]]]:
        return BadPicture, (self.bad,)


class Box(NamedTuple):
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


def decode(content: bytes, size: int, name: str, part: Callable[[int, int], Box] | None = None) -> "Tensor":
    """Decode a picture, or a part of it.

    The first frame of an animation is taken; transparent parts become white; 16 bits a channel are scaled to 8.

    Args:
        content: The encoded picture.
        size: Pixels that are needed on the short side; a JPEG may be reduced by 2, 4 or 8, to no less.
        name: The picture's name, for the error.
        part: Tells which part of an upright picture (height, width) is needed; None: all of it.

    Returns:
        uint8 (3, H, W), upright; channels last in memory, with which resizes are fastest.

    Raises:
        BadPicture: It cannot be decoded.
    """
    import torch
    from PIL import Image, ImageOps, UnidentifiedImageError

    load_plugins()
    Image.MAX_IMAGE_PIXELS = None  # the limit below is an error, Pillow's is at first a warning
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
            # A JPEG decoder can skip detail that a resize would throw away.
            if part is None:
                image.draft("RGB", (size, size))
                ImageOps.exif_transpose(image, in_place=True)
                return torch.from_numpy(_rgb(image)).permute(2, 0, 1)
            turned = image.getexif().get(ORIENTATION) in ON_ITS_SIDE
            width, height = image.size[::-1] if turned else image.size
            box = part(height, width)
            reduction = max(1, min(box.height, box.width) // size)
            image.draft("RGB", (image.width // reduction, image.height // reduction))
            ImageOps.exif_transpose(image, in_place=True)
            top, left, bottom, right = _scaled(box, image.height / height, image.width / width)
            return torch.from_numpy(_rgb(image.crop((left, top, right, bottom)))).permute(2, 0, 1)
    except UnidentifiedImageError:
        raise BadPicture([(name, "not a picture" if content else "empty file")]) from None
    except DAMAGE as error:
        raise BadPicture([(name, (str(error) or type(error).__name__).splitlines()[0])]) from None


def to_image(picture: "Tensor") -> "PIL.Image.Image":
    """Return a picture, uint8 (3, H, W), as an image of Pillow's."""
    from PIL import Image

    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def _scaled(box: Box, down: float, across: float) -> tuple[int, int, int, int]:
    """Return top, left, bottom and right of a part of a picture that was reduced to such shares of its sides."""
    top, left = round(box.top * down), round(box.left * across)
    return top, left, top + max(1, round(box.height * down)), left + max(1, round(box.width * across))


def _rgb(image: "PIL.Image.Image") -> np.ndarray:
    """Convert a Pillow image to (H, W, 3) uint8."""
    from PIL import Image

    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("more than 16 bits a pixel")
        return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, 2)
    if image.mode == "F":
        raise ValueError("pixels that are fractions have no defined range")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*WHITE, 255)), image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
