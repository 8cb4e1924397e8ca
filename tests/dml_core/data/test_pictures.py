"""Every kind of picture becomes RGB or is refused by name; nothing crashes, nothing hangs."""

import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dml_core.data import pictures
from dml_core.data.pictures import BadPicture, decode
from dml_core.data.transforms import evaluation_view, training_view


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.effect_noise(size, 80).convert(mode)


KINDS = {
    "gray": encoded(noise("L"), "PNG"),
    "black and white": encoded(noise("1"), "PNG"),
    "palette": encoded(noise("P"), "GIF"),
    "alpha": encoded(noise("RGBA"), "PNG"),
    "gray with alpha": encoded(noise("LA"), "PNG"),
    "cmyk": encoded(noise("CMYK"), "JPEG"),
    "16 bit": encoded(Image.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 21), "PNG"),
    "animated": encoded(noise("P"), "GIF", save_all=True, append_images=[noise("P")] * 3),
    "webp": encoded(noise(), "WEBP"),
    "tiff": encoded(noise(), "TIFF"),
    "progressive": encoded(noise(), "JPEG", progressive=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_all_kinds_become_rgb(kind: str) -> None:
    picture = decode(KINDS[kind], 48, "a")
    assert picture.shape == (3, 48, 64) and picture.dtype == torch.uint8 and picture.unique().numel() > 1


def test_sixteen_bits_are_scaled_not_cut() -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    assert decode(encoded(Image.fromarray(values), "PNG"), 1, "a")[0].tolist() == [[0, 0, 1, 128, 255]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (10, 10, 10, 0))
    options = {"transparency": 0} if mode == "P" else {}
    content = encoded(image.convert(mode) if mode != "P" else Image.new("P", (4, 4), 0), "PNG", **options)
    assert (decode(content, 4, "a") == 255).all()


def test_rotated_and_large_jpegs() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.new("RGB", (800, 400)), "JPEG", exif=exif)
    assert decode(content, 100, "a").shape == (3, 200, 100)  # upright, and decoded at a quarter of its size


def test_a_crop_is_never_enlarged_more_than_the_plain_way_would() -> None:
    content = encoded(noise(size=(1000, 1000)), "JPEG")
    view = training_view("crop", 224)
    assert view.side * (0.4 * 0.75) ** 0.5 >= 224  # the least side of a random crop
    assert decode(content, view.side, "a").shape == (3, 500, 500)


@pytest.mark.parametrize("name", ["crop", "shift", "none"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9000), (9000, 1), (3, 500)])
def test_pixels_and_strips_become_squares(name: str, size: tuple[int, int]) -> None:
    picture = decode(encoded(noise(size=size), "PNG"), 32, "a")
    for view in (evaluation_view(32), training_view(name, 32)):
        assert view.transform(picture).shape == (3, 32, 32)


@pytest.mark.parametrize("size", [8, 32, 64, 224])
@pytest.mark.parametrize("shape", [(2, 3), (31, 500), (32, 32), (33, 32), (224, 225), (640, 480)])
def test_evaluation_view_has_the_bits_of_torchvisions_transforms(size: int, shape: tuple[int, int]) -> None:
    from torchvision.transforms import v2

    usual = v2.Compose([v2.CenterCrop(min(shape)), v2.Resize((size, size), antialias=True)])
    picture = torch.randint(256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for layout in (picture.permute(2, 0, 1), picture.permute(2, 0, 1).contiguous()):
        view = evaluation_view(size).transform(layout)
        assert view.dtype == torch.uint8 and torch.equal(view, usual(layout))


def test_middle_square_is_the_view_of_resize_and_crop() -> None:
    from torchvision.transforms import v2

    smooth = torch.arange(0, 256, 2).expand(3, 64, 128).to(torch.uint8)
    usual = v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop(32)])(smooth)
    assert (evaluation_view(32).transform(smooth).int() - usual.int())[..., 1:-1].abs().max() <= 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"no picture", "not a picture"),
        (b"\x89PNG\r\n\x1a\n torn", "not a picture"),
        (KINDS["progressive"][:900], "truncated"),
        (encoded(noise(), "PNG")[:900], "truncated"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "fractions"),
    ],
)
def test_unreadable_picture_is_named_with_the_reason(content: bytes, reason: str) -> None:
    with pytest.raises(BadPicture, match=f"unreadable picture some/name.jpg: .*{reason}") as refusal:
        decode(content, 8, "some/name.jpg")
    assert "\n" not in str(refusal.value) and " at 0x" not in str(refusal.value)


def test_bombs_are_refused_before_they_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    assert len(content) < 100_000
    with warnings.catch_warnings(), pytest.raises(BadPicture, match=r"20000 x 20000 pixels are more than 100,000,000"):
        warnings.simplefilter("error")
        decode(content, 8, "bomb.png")


def test_many_bad_ones_are_counted() -> None:
    error = BadPicture([(f"{i}.jpg", "torn") for i in range(25)])
    assert "19.jpg: torn; and 5 more" in str(error) and "20.jpg" not in str(error)


def test_a_thousand_damaged_pictures() -> None:
    """Cut, with bits turned over, with parts overwritten: each is decoded or named."""
    rng, refused = np.random.default_rng(0), 0
    sources = list(KINDS.values())
    for number in range(1000):
        content = bytearray(sources[number % len(sources)])
        if number % 3 == 0:
            content = content[: rng.integers(0, len(content))]
        elif number % 3 == 1:
            for place in rng.integers(0, len(content), 20):
                content[place] ^= 1 << int(rng.integers(8))
        else:
            start = int(rng.integers(0, len(content)))
            content[start : start + 64] = os.urandom(64) if number % 2 else bytes(64)
        name = f"{number}.jpg"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert decode(bytes(content), 8, name).shape[0] == 3
            except BadPicture as error:
                assert [bad for bad, _ in error.bad] == [name]
                refused += 1
    assert 300 < refused < 1000


def test_pictures_module_needs_pillow_only_when_used() -> None:
    assert "from PIL" not in Path(pictures.__file__).read_text().split("def ")[0]
