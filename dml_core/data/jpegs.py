"""Views of photographs whose JPEGs the device decodes: other processes read and plan, this one decodes and resizes.

On a GPU by nvJPEG, whose pixels differ from a processor's by rounding; so do resizes, in float32 and of whole pixels.
What a device does not decode is decoded by the processor: other formats, JPEGs in gray or CMYK, damaged ones. Which of
the two it is depends on the picture alone, hence no view's bits on the batch.
"""

import io
import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

from dml_core.data.datasets import LabelledImages
from dml_core.data.loading import Augmentation, Views, drawn_crops, each_readable, send
from dml_core.data.pictures import DAMAGE, MAX_PIXELS, ON_ITS_SIDE, ORIENTATION, Box
from dml_core.data.sampling import Rows
from dml_core.data.transforms import crop_box, is_mirrored, middle_square


class Jpeg(NamedTuple):
    """A JPEG to decode, and the view to make of it.

    Attributes:
        row: Its row in the batch.
        bytes: Its place in the batch's content.
        orientation: EXIF's, 1..8.
        box: The part of the upright picture that the view shows.
        mirrored: Whether the view is a mirror image.
    """

    row: int
    bytes: slice
    orientation: int
    box: Box
    mirrored: bool


class Encoded(NamedTuple):
    """A batch of which some pictures are still encoded.

    Attributes:
        content: uint8 (bytes,), one JPEG after the other.
        jpegs: What they are.
        views: uint8 (b - len(jpegs), S, S, 3), of the other pictures, in their order.
    """

    content: Tensor
    jpegs: list[Jpeg]
    views: Tensor


class JpegViews(Dataset[Encoded]):
    """Views of labelled pictures as Views has them, and asked for in the same way, with JPEGs decoded by a device.

    Args:
        images: The pictures.
        size: S, width and height of views in pixels.
        augmentation: What a seed changes, see Views.
        device: Decodes.

    Raises:
        ValueError: The device cannot decode JPEGs.
    """

    def __init__(self, images: LabelledImages, size: int, augmentation: Augmentation, device: torch.device):
        self.images, self.size, self.device = images, size, device
        self.by_processor = Views(images, size, augmentation)
        try:
            decode_jpegs([torch.frombuffer(bytearray(_smallest_jpeg()), dtype=torch.uint8)], device)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            message = f"data.decode=gpu: torchvision cannot decode JPEGs on {device} ({reason}); allowed: cpu"
            raise ValueError(message) from error

    def batches(self, rows: Iterable[Rows], processes: int = 0, pinned: bool = False) -> Iterator[Tensor]:
        """Yield one batch on the device for each entry of `rows`, in that order. Arguments as of Views.batches."""
        rows_to_read, rows_to_finish = itertools.tee(rows)
        as_it_is: Any = _same
        loader = DataLoader(self, batch_sampler=rows_to_read, num_workers=processes, collate_fn=as_it_is)
        for encoded, batch_rows in zip(loader, rows_to_finish, strict=True):
            yield self.finish(encoded, batch_rows)

    def batch(self, rows: Rows) -> Tensor:
        """Return the views of a batch, uint8 (b, 3, S, S) on the device; see __getitems__ for errors."""
        return self.finish(self.__getitems__(rows), rows)

    def __getitems__(self, rows: Rows) -> Encoded:
        """Read a batch, plan its views, and make those that are the processor's.

        Raises:
            BadPicture: Pictures cannot be read; the error names all of them.
        """
        crops = drawn_crops(rows, self.by_processor.augmentation)
        contents, jpegs, views, start = list[bytes](), list[Jpeg](), list[Tensor](), 0

        def plan(row: int) -> None:
            nonlocal start
            sample, numbers = rows[row][0], None if crops is None else crops[row]
            content = self.images.read_file(sample)
            if (header := read_header(content)) is None:
                views.append(self.by_processor.view(sample, numbers).permute(1, 2, 0))
                return
            height, width, orientation = header
            box = middle_square(height, width) if numbers is None else crop_box(numbers, height, width)
            mirrored = numbers is not None and is_mirrored(numbers)
            jpegs.append(Jpeg(row, slice(start, start + len(content)), orientation, box, mirrored))
            contents.append(content)
            start += len(content)

        each_readable(plan, range(len(rows)))
        content = torch.frombuffer(bytearray(b"".join(contents) or b"\0"), dtype=torch.uint8)
        others = torch.stack(views) if views else torch.empty(0, self.size, self.size, 3, dtype=torch.uint8)
        return Encoded(content, jpegs, others)

    def finish(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Decode and resize what is still encoded, and put the batch together: uint8 (b, 3, S, S) on the device."""
        batch = torch.empty(len(rows), self.size, self.size, 3, dtype=torch.uint8, device=self.device)
        batch = batch.permute(0, 3, 1, 2)
        contents = [encoded.content[jpeg.bytes] for jpeg in encoded.jpegs]
        damaged = list[Jpeg]()
        for jpeg, picture in zip(encoded.jpegs, self._decoded(contents), strict=True):
            if picture is None:
                damaged.append(jpeg)
            else:
                batch[jpeg.row] = view_of(picture, jpeg, self.size)

        def by_processor(jpeg: Jpeg) -> None:
            view = self.by_processor.part(rows[jpeg.row][0], lambda *_: jpeg.box, jpeg.mirrored)
            batch[jpeg.row] = view.to(self.device)

        each_readable(by_processor, damaged)
        others = sorted({*range(len(rows))} - {jpeg.row for jpeg in encoded.jpegs})
        if others:
            places = send(torch.tensor(others), self.device)
            batch.index_copy_(0, places, send(encoded.views.permute(0, 3, 1, 2), self.device))
        return self.by_processor.shifted(batch, rows)

    def _decoded(self, contents: list[Tensor]) -> list[Tensor | None]:
        """Decode JPEGs; None for those that the device cannot decode. Where one fails, the library gives no others."""
        if not contents:
            return []
        try:
            return [*decode_jpegs(contents, self.device)]
        except torch.OutOfMemoryError:  # says nothing of a picture
            raise
        except RuntimeError:
            return [None] if len(contents) == 1 else [self._decoded([content])[0] for content in contents]


def decode_jpegs(contents: list[Tensor], device: torch.device) -> list[Tensor]:
    """Decode JPEGs on a device.

    Args:
        contents: Each uint8 (bytes,), on the processor.
        device: That decodes.

    Returns:
        Of each uint8 (3, H, W), as it is stored.

    Raises:
        RuntimeError: One of them cannot be decoded.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions announce another library, which this is not to depend on yet
        pictures = decode_jpeg(contents, mode=ImageReadMode.RGB, device=device)
    assert isinstance(pictures, list)
    return pictures


def read_header(content: bytes) -> tuple[int, int, int] | None:
    """Return height and width of a JPEG when upright, and EXIF's orientation, 1..8.

    None: it is no JPEG in color, or not one that a device is to be given; the processor decides what it is.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.format != "JPEG" or image.mode != "RGB" or image.width * image.height > MAX_PIXELS:
                return None
            orientation = image.getexif().get(ORIENTATION, 1)
            width, height = image.size[::-1] if orientation in ON_ITS_SIDE else image.size
    except DAMAGE:  # of which the processor's way tells
        return None
    return height, width, orientation if orientation in range(1, 9) else 1


def upright(picture: Tensor, orientation: int) -> Tensor:
    """Turn a picture (3, H, W), as it is stored, upright. orientation: EXIF's, 1..8."""
    if orientation in ON_ITS_SIDE:
        picture = picture.transpose(1, 2)
    flipped = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation, [])
    return picture.flip(flipped) if flipped else picture


def view_of(picture: Tensor, jpeg: Jpeg, size: int) -> Tensor:
    """Return the view of a decoded JPEG (3, H, W): uint8 (3, size, size)."""
    top, left, height, width = jpeg.box
    part = upright(picture, jpeg.orientation)[None, :, top : top + height, left : left + width]
    view = interpolate(part.float(), [size, size], mode="bilinear", align_corners=False, antialias=True)[0]
    view = view.round_().clamp_(0, 255).to(torch.uint8)
    return view.flip(2) if jpeg.mirrored else view


def _smallest_jpeg() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    return file.getvalue()


def _same(batch: Encoded) -> Encoded:
    return batch
