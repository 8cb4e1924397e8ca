"""JPEGs that a device decodes: a processor stands in for it, on the same path."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dml_core.data import jpegs
from dml_core.data.datasets import LabelledImages
from dml_core.data.jpegs import JpegViews, read_header, upright
from dml_core.data.loading import Views
from dml_core.data.pictures import BadPicture
from dml_core.data.user_sets import load_folder

SIZE, CPU = 24, torch.device("cpu")


def smooth(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    y, x = np.mgrid[: size[1], : size[0]]
    channels = [(x * 2) % 256, (y * 2) % 256, (x + y) % 256]
    image = Image.fromarray(np.stack(channels, 2).astype(np.uint8)).resize(size)
    return image.convert(mode)


@pytest.fixture
def images(tmp_path: Path) -> LabelledImages:
    """JPEGs of all orientations and other kinds of pictures, in names that sort in this order."""
    folder = tmp_path / "class"
    folder.mkdir()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        smooth((60, 45)).save(folder / f"{orientation}.jpg", quality=95, exif=exif)
    smooth((40, 60)).save(folder / "a progressive.jpg", progressive=True, quality=95)
    smooth((40, 60), "L").save(folder / "b gray.jpg")
    smooth((40, 60), "CMYK").save(folder / "c cmyk.jpg")
    smooth((40, 60)).save(folder / "d png.png")
    return load_folder(str(tmp_path)).images


@pytest.mark.parametrize("name", ["crop", "shift", "none"])
def test_views_are_those_of_the_processor_but_for_rounding(images: LabelledImages, name: str) -> None:
    ours, theirs = JpegViews(images, SIZE, name, CPU), Views(images, SIZE, name)
    for seed in (None, 7):
        rows = [(sample, None if seed is None else seed + sample) for sample in range(len(images))]
        views, expected = ours.batch(rows), theirs.batch(rows)
        assert views.shape == expected.shape and views.dtype == torch.uint8
        difference = (views.int() - expected.int()).abs()
        assert difference.max() <= 2 and difference.float().mean() < 0.3
        for row, view in zip(rows, views, strict=True):  # on its own, too
            assert torch.equal(ours.batch([row])[0], view)
        for processes in (0, 1):
            (batch,) = ours.batches([rows], processes)
            assert torch.equal(batch, views)


def test_what_is_no_jpeg_in_color_is_the_processors(images: LabelledImages) -> None:
    read = [read_header(images.read_file(sample)) for sample in range(len(images))]
    sides = [(45, 60)] * 4 + [(60, 45)] * 4
    assert read[:8] == [(*side, orientation) for orientation, side in enumerate(sides, 1)]
    assert read[8:] == [(60, 40, 1), None, None, None]
    assert [jpeg.row for jpeg in JpegViews(images, SIZE, "none", CPU).__getitems__([(9, None), (2, None)]).jpegs] == [1]
    assert read_header(b"") is None and read_header(b"no picture") is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_pillows(orientation: int) -> None:
    from PIL import ImageOps

    image = smooth((7, 5))
    image.getexif()[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "PNG", exif=image.getexif())
    expected = np.array(ImageOps.exif_transpose(Image.open(file))).transpose(2, 0, 1)
    assert np.array_equal(upright(torch.from_numpy(np.array(image)).permute(2, 0, 1), orientation), expected)


def test_damaged_jpegs_are_named_or_decoded_by_the_processor(images: LabelledImages) -> None:
    rows = [(sample, 3) for sample in range(5)]
    views = JpegViews(images, SIZE, "crop", CPU)
    whole = views.batch(rows)
    for sample, content in ((1, b"no picture"), (3, images.read_file(3)[:700])):
        Path(images.files.root, images.entry(sample)).write_bytes(content)
        with pytest.raises(BadPicture) as refusal:
            views.batch(rows)
        assert images.entry(sample) in str(refusal.value)
        Path(images.files.root, images.entry(sample)).write_bytes(images.read_file(0))
    assert torch.equal(views.batch(rows)[[0, 2, 4]], whole[[0, 2, 4]])


def test_a_jpeg_that_only_the_device_cannot_decode(images: LabelledImages, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others of its batch keep their bits."""
    rows, decode = [(sample, 3) for sample in range(4)], jpegs.decode_jpegs
    views, unsupported = JpegViews(images, SIZE, "crop", CPU), images.read_file(2)
    whole = views.batch(rows)

    def decode_some(contents: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        if any(content.numpy().tobytes() == unsupported for content in contents):
            raise RuntimeError("not supported")
        return decode(contents, device)

    monkeypatch.setattr(jpegs, "decode_jpegs", decode_some)
    found = views.batch(rows)
    assert torch.equal(found[[0, 1, 3]], whole[[0, 1, 3]])
    assert torch.equal(found[2], Views(images, SIZE, "crop").batch(rows)[2])


def test_a_device_that_decodes_no_jpegs_is_refused(images: LabelledImages, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("not compiled with nvJPEG support\nat some place")

    monkeypatch.setattr(jpegs, "decode_jpegs", fail)
    with pytest.raises(ValueError, match=r"data.decode=gpu: .* \(not compiled with nvJPEG support\); allowed: cpu$"):
        JpegViews(images, SIZE, "none", CPU)


def test_a_device_out_of_memory_says_nothing_of_a_picture(
    images: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = JpegViews(images, SIZE, "none", CPU)

    def fail(contents: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(jpegs, "decode_jpegs", fail)
    with pytest.raises(torch.OutOfMemoryError):
        views.batch([(0, None), (1, None)])
