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
from dml_core.data.loading import Views
from dml_core.data.pictures import BadPicture, Box, decode
from dml_core.data.transforms import evaluation_view
from dml_core.data.user_sets import load_folder


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


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_part_is_cut_out_of_the_upright_picture(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content, shapes = encoded(noise(size=(80, 60)), kind, exif=exif), []

    def part(height: int, width: int) -> Box:
        shapes.append((height, width))
        return Box(10, 20, 40, 30)

    picture = decode(content, 30, "a", part)
    whole = decode(content, 60, "a")
    assert torch.equal(picture, whole[:, 10:50, 20:50]) and shapes == [whole.shape[1:]]


@pytest.mark.parametrize(("size", "sides"), [(101, (200, 250)), (100, (100, 125)), (25, (25, 31))])
def test_a_part_is_reduced_to_no_less_than_is_needed(size: int, sides: tuple[int, int]) -> None:
    y, x = np.mgrid[:400, :600]
    image = Image.fromarray(((x + y) // 4).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image = image.rotate(90, expand=True)  # as it lies in a file that is to be turned by 270 degrees
    content = encoded(image, "JPEG", exif=exif, quality=95)
    picture = decode(content, size, "a", lambda height, width: Box(100, 40, 200, 250))
    assert picture.shape == (3, *sides)
    expected = torch.from_numpy(((x + y) // 4).astype(np.uint8))[None, 100:300, 40:290].float()
    expected = torch.nn.functional.interpolate(expected[None], sides, mode="area")[0]
    assert (picture.float() - expected).abs().max() < 4


@pytest.mark.parametrize("name", ["crop", "shift", "none"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9000), (9000, 1), (3, 500)])
def test_pixels_and_strips_become_squares(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    (tmp_path / "class").mkdir()
    noise(size=size).save(tmp_path / "class" / "strip.png")
    views = Views(load_folder(str(tmp_path)).images, 32, name)
    assert views.batch([(0, None)]).shape == (1, 3, 32, 32)
    assert views.batch([(0, seed) for seed in range(5)]).shape == (5, 3, 32, 32)


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
