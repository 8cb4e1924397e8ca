"""Encoded pictures of every kind to uint8 tensors (3, H, W), upright, in RGB; what cannot be is refused by name."""

import io
import struct

import numpy as np
import torch
from torch import Tensor

MAX_PIXELS = 100_000_000
WHITE = (255, 255, 255)


class BadPicture(ValueError):
    """Pictures that cannot be read: (name, reason) of each."""

    def __init__(self, bad: list[tuple[str, str]]):
        self.bad = bad
        told = "; ".join(f"{name}: {reason}" for name, reason in bad[:20])
        more = f"; and {len(bad) - 20} more" if len(bad) > 20 else ""
        super().__init__(f"unreadable picture{'s' * (len(bad) > 1)} {told}{more}")

    def __reduce__(self) -> tuple[type, tuple[list[tuple[str, str]]]]:
        return BadPicture, (self.bad,)


def decode(content: bytes, size: int, name: str) -> Tensor:
    """uint8 (3, H, W), upright, channels last in memory, as resizes like it. BadPicture if it cannot be read.

    size: what is needed; a JPEG may come reduced by 2, 4 or 8, never below that on its short side.
    Of an animation the first frame; transparent parts become white; 16 bits a channel are scaled to 8.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None  # the limit below is an error, Pillow's is at first a warning
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
            image.draft("RGB", (size, size))  # a JPEG decoder can leave out detail that a resize would throw away
            ImageOps.exif_transpose(image, in_place=True)
            return torch.from_numpy(_rgb(image)).permute(2, 0, 1)
    except UnidentifiedImageError:
        raise BadPicture([(name, "not a picture" if content else "empty file")]) from None
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, ArithmeticError, struct.error) as error:
        # Pillow's decoders fail in all these ways on damaged files.
        raise BadPicture([(name, (str(error) or type(error).__name__).splitlines()[0])]) from None


def _rgb(image) -> np.ndarray:  # type: ignore[no-untyped-def]
    """A Pillow image to (H, W, 3) uint8."""
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
