import unicodedata
from pathlib import Path

import numpy as np
import pytest

from dml_core.data import glyphs
from dml_core.data.glyphs import Glyphs


@pytest.fixture(scope="module")
def rendered(cache: Path) -> Glyphs:
    return glyphs.load(cache)


@pytest.fixture(scope="module")
def label_of(rendered: Glyphs) -> dict[str, int]:
    """Character a class is named after -> class."""
    return {chr(int(name.split()[0][2:], 16)): label for label, name in enumerate(rendered.class_names)}


def equal(one: Glyphs, other: Glyphs) -> bool:
    arrays = np.array_equal(one.images, other.images) and np.array_equal(one.labels, other.labels)
    return arrays and one.class_names == other.class_names


def test_shapes_types_and_counts(rendered: Glyphs) -> None:
    count = len(rendered.labels)
    assert rendered.images.shape == (count, 32, 32) and rendered.images.dtype == np.uint8
    assert rendered.labels.shape == (count,) and rendered.labels.dtype == np.int64
    assert 25_000 < count < 60_000
    assert 2_500 < len(rendered.class_names) < 3_500
    assert (np.diff(rendered.labels) >= 0).all()


def test_every_class_has_images_in_eight_fonts(rendered: Glyphs) -> None:
    assert np.bincount(rendered.labels, minlength=len(rendered.class_names)).min() >= 8


def test_images_are_neither_blank_nor_clipped_nor_repeated(rendered: Glyphs) -> None:
    images = rendered.images
    assert images.max(axis=(1, 2)).min() > 90
    # What touches the border is the soft edge of an image that was made smaller to fit.
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1)
    assert border.max() < 160
    assert images.mean() < 40  # bright ink on a dark ground
    assert len({image.tobytes() for image in images}) > 0.99 * len(images)


def test_names_are_unique_file_names_in_code_point_order(rendered: Glyphs) -> None:
    names = rendered.class_names
    assert len(set(names)) == len(names)
    assert "U+0041 LATIN CAPITAL LETTER A" in names
    assert all(set(name) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+- ") and len(name) < 120 for name in names)
    codes = [int(name.split()[0][2:], 16) for name in names]
    assert codes == sorted(codes)
    assert all(unicodedata.category(chr(code))[0] in "LNPS" for code in codes)


@pytest.mark.parametrize("alike", ["AΑА", "oοо", "HΗН", "Å\u212b", "Ω\u2126", "ΓГ", "ëё", ".․"])
def test_look_alikes_are_one_class(label_of: dict[str, int], alike: str) -> None:
    assert alike[0] in label_of
    assert not set(alike[1:]) & set(label_of)


@pytest.mark.parametrize("different", ["oO0", ".·,", "lm", "cC", "ŎǑ", "▌▐", "-–_", "ÁÀÂ", "pqbd", "⠁⠂"])
def test_different_looks_are_different_classes(label_of: dict[str, int], different: str) -> None:
    assert set(different) <= set(label_of)


@pytest.mark.parametrize("font", ["DejaVuSerif", "STIXGeneral", "cmtt10"])
def test_classes_of_one_font_hardly_share_a_drawing(label_of: dict[str, int], font: str) -> None:
    """Drawings are compared before they are varied; a few are the same in this font and differ in most others."""
    drawn = glyphs._draw(font, [code for code in glyphs._characters(font) if chr(code) in label_of])
    assert len({cells.tobytes() for cells in drawn.cells}) > 0.98 * len(drawn.codes)


def test_a_second_drawing_is_the_same() -> None:
    codes = [ord(character) for character in "Ag.Ѝ∰‱"]
    first, second = glyphs._draw("DejaVuSans", codes), glyphs._draw("DejaVuSans", codes)
    assert first.codes.tolist() == codes
    assert np.array_equal(first.images, second.images) and np.array_equal(first.cells, second.cells)


def test_any_number_of_processes_draws_the_same() -> None:
    wanted = {font: glyphs._characters(font)[:150] for font in ("cmr10", "DejaVuSans", "DejaVuSerif")}
    alone = glyphs._draw_fonts(wanted, 1)
    assert [len(font.codes) for font in alone] == [80, 150, 150]
    for processes in (2, 5):
        for one, other in zip(glyphs._draw_fonts(wanted, processes), alone, strict=True):
            assert all(np.array_equal(first, second) for first, second in zip(one, other, strict=True))


def test_a_process_that_fails_is_no_glyphs_at_all() -> None:
    with pytest.raises(RuntimeError, match="drawing NoSuchFont: a process ended with 1"):
        glyphs._draw_fonts({"cmr10": [65, 66], "NoSuchFont": [65]}, 2)


def test_blank_and_missing_characters_are_not_drawn() -> None:
    assert glyphs._draw("DejaVuSans", [ord("A"), 0x2800, 0x10FFFE]).codes.tolist() == [ord("A")]


def test_tex_fonts_give_only_what_their_code_points_say() -> None:
    assert not {ord(character) for character in "<>{}|$^_~`"} & set(glyphs._characters("cmr10"))


def test_cached_file_is_read_and_a_corrupt_one_rendered_again(
    rendered: Glyphs, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = Glyphs(rendered.images[:500], rendered.labels[:500], rendered.class_names)
    renders = []

    def render() -> Glyphs:
        renders.append(1)
        return few

    monkeypatch.setattr(glyphs, "render", render)
    assert equal(glyphs.load(cache), rendered) and not renders  # all of it, from the file
    assert equal(glyphs.load(tmp_path), few) and len(renders) == 1
    (file,) = tmp_path.iterdir()  # no temporary file is left
    whole = file.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes(byte ^ 255 for byte in whole[middle : middle + 100]) + whole[middle + 100 :]
    for broken in (whole[:middle], flipped, b"", b"not a zip file"):
        renders.clear()
        file.write_bytes(broken)
        assert equal(glyphs.load(tmp_path), few) and len(renders) == 1
        assert equal(glyphs.load(tmp_path), few) and len(renders) == 1
        assert list(tmp_path.iterdir()) == [file]


def test_a_failed_write_leaves_nothing(rendered: Glyphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(glyphs, "render", lambda: rendered)
    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        glyphs.load(tmp_path)
    assert not list(tmp_path.iterdir())
