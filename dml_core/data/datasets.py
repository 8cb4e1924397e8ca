"""Labelled pictures, their class-disjoint splits, and the sets that are read here: glyphs, folder, grocery."""

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dml_core.data import glyphs

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


@dataclass(frozen=True)
class LabelledImages:
    """Pictures with class labels.

    images: N files, or a uint8 array (N, H, W) of gray pictures.  labels: (N,) int64 in 0..C-1.  class_names: C names.
    root: the folder that file names are told from.  whole, places: the set of which these are `places` (N,), if any.
    """

    images: Sequence[Path] | np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    root: Path | None = None
    whole: "LabelledImages | None" = None
    places: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int, size: int) -> Tensor:
        """One picture, uint8 (3, H, W); a JPEG may come reduced, never below `size` pixels on its short side.

        ValueError names a file that cannot be read.
        """
        image = self.images[index]
        if isinstance(image, Path):
            return decode(image, size, str(image))
        return torch.from_numpy(np.asarray(image)).expand(3, -1, -1).contiguous()

    def rows(self, keep: np.ndarray) -> "LabelledImages":
        """Some of the samples (a mask or indices), the classes as they are."""
        index = np.flatnonzero(keep) if keep.dtype == bool else keep
        images = self.images[index] if isinstance(self.images, np.ndarray) else [self.images[int(i)] for i in index]
        places = index if self.places is None else self.places[index]
        return LabelledImages(images, self.labels[index], self.class_names, self.root, self.whole or self, places)

    def of_classes(self, classes: np.ndarray) -> "LabelledImages":
        """The samples of some classes, which are numbered anew in the order given."""
        number = np.full(len(self.class_names), -1)
        number[classes] = np.arange(len(classes))
        kept = self.rows(number[self.labels] >= 0)
        names = tuple(self.class_names[c] for c in classes)
        return replace(kept, labels=number[kept.labels], class_names=names)

    def names(self) -> list[str]:
        """One name a sample: its path below the root, or its place in the array."""
        if isinstance(self.images, np.ndarray):
            return [str(i) for i in range(len(self))]
        return [str(p.relative_to(self.root)) if self.root else str(p) for p in self.images]

    def digest(self) -> str:
        """Tells two sets apart: sha256 over names, labels and, for files, sizes and times of change."""
        h = hashlib.sha256(repr(self.class_names).encode() + self.labels.tobytes())
        if isinstance(self.images, np.ndarray):
            h.update(self.images.tobytes())
        else:
            for name, path in zip(self.names(), self.images, strict=True):
                status = path.stat()
                h.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return h.hexdigest()[:16]


class Retrieval(NamedTuple):
    """A retrieval task over one set of classes. No gallery: every sample is a query against all the others."""

    query: LabelledImages
    gallery: LabelledImages | None = None


class Splits(NamedTuple):
    """Three sets of classes, none of which share a class."""

    train: LabelledImages
    validation: Retrieval | None
    test: Retrieval


def split(
    images: LabelledImages,
    test_classes: np.ndarray,
    validation_fraction: float,
    seed: int,
    queries: np.ndarray | None = None,
    limit_classes: int | None = None,
) -> Splits:
    """Class-disjoint splits.

    test_classes: ids of the classes to test on; of the others, `validation_fraction` (at least one) are drawn by `seed`
    for validation, none for 0.  queries: (N,) mask of the samples that are queries in validation and test, the rest
    being the gallery; None: query set = gallery.  limit_classes: at most so many classes to test on, and so many to
    train and validate on. The `whole` of the splits is then what is left; else it does not depend on the seed.
    ValueError where fewer than two training classes or no test class are left.
    """
    rng = np.random.default_rng(seed)
    others = rng.permutation(np.setdiff1d(np.arange(len(images.class_names)), test_classes))[:limit_classes]
    held_out = max(1, round(validation_fraction * len(others))) if validation_fraction else 0
    train, validation = np.sort(others[held_out:]), np.sort(others[:held_out])
    test = np.sort(rng.permutation(test_classes)[:limit_classes])
    if len(train) < 2 or len(test) == 0:
        raise ValueError(
            f"{len(images.class_names)} classes give {len(train)} to train, {len(validation)} to validate and "
            f"{len(test)} to test on; at least 2 to train and 1 to test on are needed"
        )

    if limit_classes:
        used = np.isin(images.labels, [*train, *validation, *test])
        queries = None if queries is None else queries[used]
        images = replace(images.rows(used), whole=None, places=None)

    def retrieval(classes: np.ndarray) -> Retrieval:
        chosen = images.of_classes(classes)
        if queries is None:
            return Retrieval(chosen)
        mask = queries[np.isin(images.labels, classes)]
        return Retrieval(chosen.rows(mask), chosen.rows(~mask))

    return Splits(images.of_classes(train), retrieval(validation) if held_out else None, retrieval(test))


def load_glyphs(cache: Path) -> LabelledImages:
    images, labels, class_names = glyphs.load(cache)
    return LabelledImages(images, labels, tuple(class_names))


def load_folder(root: Path) -> LabelledImages:
    """A class-per-folder tree: root/CLASS/**/PICTURE.

    ValueError for a missing folder, one without classes, and classes without a picture (all of them are named).
    """
    if not root.is_dir():
        raise ValueError(f"data.root={root}: no such folder")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [sorted(p for p in f.rglob("*") if p.suffix.lower() in PICTURES and p.is_file()) for f in folders]
    if not folders:
        raise ValueError(f"data.root={root}: no class folders in it; expected root/CLASS/PICTURE.jpg")
    if empty := [f.name for f, found in zip(folders, files, strict=True) if not found]:
        raise ValueError(f"data.root={root}: class folders without a picture: {', '.join(empty)}")
    labels = np.repeat(np.arange(len(folders)), [len(found) for found in files])
    return LabelledImages([p for found in files for p in found], labels, tuple(f.name for f in folders), root)


def load_grocery(root: Path) -> tuple[LabelledImages, np.ndarray]:
    """The Grocery Store Dataset (Klasson et al., WACV 2019), 81 fine classes, in its own layout.

    Returns the pictures of all three lists, and a mask of those of test.txt: they were taken in other shops.
    """
    folder = root / "dataset" if (root / "dataset").is_dir() else root
    needed = [folder / name for name in ("classes.csv", "train.txt", "val.txt", "test.txt")]
    if missing := [str(path) for path in needed if not path.is_file()]:
        raise ValueError(f"data.root={root}: not the Grocery Store Dataset, there is no {', '.join(missing)}")
    with open(needed[0], newline="") as file:
        names = {int(row["Class ID (int)"]): row["Class Name (str)"] for row in csv.DictReader(file)}
    paths, labels, queries = [], [], []
    for listing in needed[1:]:
        for line in listing.read_text().splitlines():
            name, fine, _ = line.split(",")
            paths.append(folder / name.strip())
            labels.append(int(fine))
            queries.append(listing.name == "test.txt")
    images = LabelledImages(paths, np.array(labels), tuple(names[i] for i in range(len(names))), folder)
    return images, np.array(queries)


def decode(file: Path | BinaryIO, size: int, name: str) -> Tensor:
    """An encoded picture to uint8 (3, H, W), upright. ValueError with its name if it cannot be read."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            # A JPEG decoder can leave out detail that the resize would throw away.
            image.draft("RGB", (size, size))
            upright = ImageOps.exif_transpose(image).convert("RGB")
            return torch.from_numpy(np.array(upright)).permute(2, 0, 1).contiguous()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"unreadable picture {name}: {error}") from error
