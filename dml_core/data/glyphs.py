"""Pictures without a download: the characters of the fonts that matplotlib ships, one class a character.

A class is what a character looks like: Latin A, Greek Alpha and Cyrillic A are one. Its images are its fonts, each
drawn at a slightly different size and place. Ink is bright (255) on black (0).
"""

import contextlib
import os
import pickle
import string
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dml_core.cpus import usable_cpus

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT_VERSION = 1  # of the cached file: raise it when the images change
SIZE = 32  # side of an image, pixels
MIN_FONTS = 8

TEXT_FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
)
# Computer Modern keeps TeX's encoding: its '<' is an inverted '!', its '{' a dash, cmti10's '$' a pound sign.
# Only these characters are what their code points say.
TEX_FONTS = ("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10")
TEX_CHARACTERS = frozenset(map(ord, string.ascii_letters + string.digits + "!%&()*+,-./:;=?@[]"))
# Left out: cmex10, cmmi10, cmsy10 (code points are slots of TeX's math fonts), STIXNonUni* (private use), STIXSiz* and
# DejaVu*Display (large math pieces, not at the em size of their text), LastResort (a box for every character there is).

# A character is drawn once, large, and both the image and the comparison of characters are taken from that drawing.
EM = 66  # pixels an em
CANVAS = 3 * EM  # the widest glyph has 2.5 em
ORIGIN = (CANVAS // 2, 120)  # middle of the advance width, baseline
IMAGE_EM = 22  # pixels an em in an image of normal size: accents and descenders fit
IMAGE_BASELINE = 23  # row
CELL = 3  # characters are compared as means over CELL x CELL pixels, about one pixel of an image
CENTER_TOLERANCE = 4  # pixels of the drawing between the horizontal middles of the ink of look-alikes
CELL_TOLERANCE = 98  # of 255: look-alikes differ by no more in any cell; O with breve and O with caron do, by 106
PROFILE_TOLERANCE = 5 * 255  # Euclidean, of the row and column sums of the cells: the quick look before the cells


class Glyphs(NamedTuple):
    """The set: images, and the class of each."""

    images: np.ndarray  # (N, 32, 32) uint8
    labels: np.ndarray  # (N,) int64, 0..C-1, ascending; classes by their lowest code point
    class_names: list[str]  # C names such as "U+0041 LATIN CAPITAL LETTER A", after the lowest code point


class _Drawings(NamedTuple):
    """The n characters of one font that leave ink."""

    codes: np.ndarray  # (n,) int64, ascending
    images: np.ndarray  # (n, 32, 32) uint8
    cells: np.ndarray  # (n, 66, 66) uint8: the large drawing by cells, its ink centered horizontally
    centers: np.ndarray  # (n,) float64: horizontal middle of the ink in the large drawing


class _Font(NamedTuple):
    """The n characters of one font that leave ink, and which of them look the same."""

    codes: np.ndarray  # (n,) int64, ascending
    images: np.ndarray  # (n, 32, 32) uint8
    pairs: np.ndarray  # (P, 2) int64: code points of look-alikes, the lower one first


def load(cache: Path) -> Glyphs:
    """Return the glyphs, which the first call renders and stores as one file. Several processes may call at once.

    Args:
        cache: Folder of that file; created if absent.

    Raises:
        OSError: The folder cannot be written.
    """
    path = Path(cache) / f"glyphs-v{FORMAT_VERSION}-matplotlib-{version('matplotlib')}.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Glyphs(arrays["images"], arrays["labels"], arrays["class_names"].tolist())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        pass  # absent, torn or corrupt
    glyphs = render()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, **glyphs._asdict())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return glyphs


def render() -> Glyphs:
    """Draw all glyphs, the same at every call with the same matplotlib and Pillow; 8 s of a core, shared by all."""
    characters = {font: _characters(font) for font in TEXT_FONTS + TEX_FONTS}
    fonts_with = Counter(code for codes in characters.values() for code in codes)
    wanted = {font: [code for code in c if fonts_with[code] >= MIN_FONTS] for font, c in characters.items()}
    codes, images, pairs = zip(*_draw_fonts(wanted, usable_cpus()), strict=True)
    code, font_index = np.concatenate(codes), np.repeat(np.arange(len(codes)), [*map(len, codes)])

    drawn_codes, font_counts = np.unique(code, return_counts=True)
    kept = drawn_codes[font_counts >= MIN_FONTS]  # a supported character may be blank
    first_code = _merge(kept, codes, pairs)
    keep = np.isin(code, kept)
    for index, look_alikes in enumerate(pairs):  # of the look-alikes in one font, only the first is an image
        repeated = [second for first, second in look_alikes if first_code.get(first) == first_code.get(second)]
        keep &= (font_index != index) | ~np.isin(code, repeated)

    class_code = np.array([first_code[c] for c in code[keep].tolist()])
    classes, labels = np.unique(class_code, return_inverse=True)
    order = np.lexsort((font_index[keep], code[keep], labels))
    names = [f"U+{c:04X} {unicodedata.name(chr(c))}" for c in classes.tolist()]
    return Glyphs(np.concatenate(images)[keep][order], labels[order].astype(np.int64), names)


# What a process runs that draws some fonts: a new one, as one that is forked, or that begins with the caller's main
# module, would bring along much that drawing has no use for.
DRAW_SOME = """
import os, pickle, sys
os.putenv("OPENBLAS_NUM_THREADS", "1")  # NumPy's, as there is a process for each CPU
sys.path[:], wanted = pickle.load(sys.stdin.buffer)
from dml_core.data.glyphs import _draw_and_compare
pickle.dump([_draw_and_compare(*each) for each in wanted], sys.stdout.buffer)
"""


def _draw_fonts(wanted: Mapping[str, list[int]], processes: int) -> list[_Font]:
    """Draw characters of fonts, in the order of the fonts, by so many processes, of which this is one."""
    shares = [list[str]() for _ in range(min(processes, len(wanted)))]
    for font in sorted(wanted, key=lambda font: -len(wanted[font])):
        min(shares, key=lambda share: sum(len(wanted[other]) for other in share)).append(font)
    own, *others = shares
    with contextlib.ExitStack() as running:
        helpers = list[subprocess.Popen[bytes]]()
        for share in others:
            command = [sys.executable, "-c", DRAW_SOME]
            helper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            helpers.append(running.enter_context(helper))
            assert helper.stdin is not None
            helper.stdin.write(pickle.dumps((sys.path, [(font, wanted[font]) for font in share])))
            helper.stdin.flush()
        drawn = {font: _draw_and_compare(font, wanted[font]) for font in own}
        for share, helper in zip(others, helpers, strict=True):
            output, _ = helper.communicate()
            if helper.returncode:
                raise RuntimeError(f"drawing {', '.join(share)}: a process ended with {helper.returncode}")
            drawn |= zip(share, pickle.loads(output), strict=True)
    return [drawn[font] for font in wanted]


def _draw_and_compare(font: str, codes: list[int]) -> _Font:
    """Draw characters in one font, and find those that look the same in it."""
    drawings = _draw(font, codes)
    return _Font(drawings.codes, drawings.images, drawings.codes[_look_alikes(drawings)])


def _font_path(font: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"


def _characters(font: str) -> list[int]:
    """Return the code points, ascending, of a font's letters, numbers, punctuation and symbols."""
    from matplotlib.ft2font import FT2Font

    codes = sorted(FT2Font(str(_font_path(font))).get_charmap())
    if font in TEX_FONTS:
        return [code for code in codes if code in TEX_CHARACTERS]
    return [code for code in codes if unicodedata.category(chr(code))[0] in "LNPS"]


def _draw(font: str, codes: list[int]) -> _Drawings:
    """Draw characters in one font, in their order; the blank ones and the box for a missing glyph are left out."""
    from PIL import Image, ImageDraw, ImageFont

    face = ImageFont.truetype(str(_font_path(font)), EM, layout_engine=ImageFont.Layout.BASIC)
    canvas = Image.new("L", (CANVAS, CANVAS))
    pen = ImageDraw.Draw(canvas)

    def ink(code: int) -> tuple[int, int, int, int] | None:
        canvas.paste(0, (0, 0, CANVAS, CANVAS))
        pen.text(ORIGIN, chr(code), fill=255, font=face, anchor="ms")
        return canvas.getbbox()

    missing_box = ink(0x10FFFF)  # no character, hence the missing glyph
    missing = canvas.tobytes()
    # A font's name is its seed: what is drawn does not depend on the other fonts.
    jitter = np.random.default_rng(zlib.crc32(font.encode())).random((len(codes), 3))
    kept, centers = [], []
    side = CANVAS // CELL
    # One tall picture of all, as turning many small ones into arrays takes longer than drawing them.
    images = Image.new("L", (SIZE, SIZE * len(codes)))
    cells = Image.new("L", (side, side * len(codes)))
    for row, code in enumerate(codes):
        box = ink(code)
        if box is None or (box == missing_box and canvas.tobytes() == missing):
            continue
        images.paste(_image(canvas, box, *jitter[row].tolist()), (0, SIZE * row))
        center = (box[0] + box[2]) / 2
        left = round(center - CANVAS / 2)
        cells.paste(canvas.crop((left, 0, left + CANVAS, CANVAS)).reduce(CELL), (0, side * row))
        kept.append(row)
        centers.append(center)
    return _Drawings(
        np.array(codes, np.int64)[kept],
        np.asarray(images).reshape(-1, SIZE, SIZE)[kept],
        np.asarray(cells).reshape(-1, side, side)[kept],
        np.array(centers),
    )


def _image(canvas: "Image", ink: tuple[int, int, int, int], size: float, right: float, down: float) -> "Image":
    """Cut a 32 x 32 image out of a drawing, varied by `size`, `right` and `down` in [0, 1), with all of its ink."""
    from PIL import Image

    margin = 2  # pixels of the drawing
    side = EM * SIZE / IMAGE_EM / (0.85 + 0.2 * size)
    side = max(side, ink[2] - ink[0] + 2 * margin, ink[3] - ink[1] + 2 * margin)
    pixel = side / SIZE
    left = ORIGIN[0] - side / 2 - (4 * right - 2) * pixel
    top = ORIGIN[1] - IMAGE_BASELINE * pixel - (4 * down - 2) * pixel
    left = min(max(left, ink[2] + margin - side, 0), ink[0] - margin, CANVAS - side)
    top = min(max(top, ink[3] + margin - side, 0), ink[1] - margin, CANVAS - side)
    return canvas.resize((SIZE, SIZE), Image.Resampling.HAMMING, box=(left, top, left + side, top + side))


def _look_alikes(drawn: _Drawings) -> np.ndarray:
    """Return pairs (P, 2) of rows, first < second, that look the same in one font at the same size and baseline."""
    profiles = np.concatenate([drawn.cells.sum(1), drawn.cells.sum(2)], axis=1).astype(np.float32)
    square = (profiles**2).sum(1)
    distance = square[:, None] + square - 2 * profiles @ profiles.T
    first, second = np.nonzero(distance <= PROFILE_TOLERANCE**2)
    near = (first < second) & (np.abs(drawn.centers[first] - drawn.centers[second]) <= CENTER_TOLERANCE)
    first, second = first[near], second[near]
    difference = np.abs(drawn.cells[first].astype(np.int16) - drawn.cells[second]).max(axis=(1, 2), initial=0)
    alike = difference <= CELL_TOLERANCE
    return np.stack([first[alike], second[alike]], axis=1)


def _merge(kept: np.ndarray, codes: list[np.ndarray], pairs: list[np.ndarray]) -> dict[int, int]:
    """Unite characters that look the same in most of the fonts that have both.

    Args:
        kept: The code points of all classes.
        codes: The code points that are drawn, by font.
        pairs: Pairs (P, 2) of them that look the same, by font.

    Returns:
        Code point -> lowest code point of its class.
    """
    first_code = {code: code for code in kept.tolist()}

    def find(code: int) -> int:
        while first_code[code] != code:
            code = first_code[code]
        return code

    drawn = [set(c.tolist()) for c in codes]
    votes = Counter((first, second) for look_alikes in pairs for first, second in look_alikes.tolist())
    for (first, second), alike in votes.items():
        shared = sum(first in font_codes and second in font_codes for font_codes in drawn)
        if first in first_code and second in first_code and 2 * alike > shared:
            low, high = sorted((find(first), find(second)))
            first_code[high] = low
    return {code: find(code) for code in first_code}
