"""Labelled pictures, what is said of their use, and class-disjoint splits of them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.dtypes import StringDType
from torch import Tensor

from dml_core.data.files import Files
from dml_core.data.pictures import BadPicture, decode

NEITHER, QUERY, GALLERY = 0, 1, 2  # what a sample is in validation and test
CHUNK = 2**17  # names at a time where each becomes an object


def names_array(names: list[str]) -> np.ndarray:
    """(N,) of NumPy's type for strings: 10 million paths take 16 bytes each and their letters."""
    return np.array(names, dtype=StringDType())


@dataclass(frozen=True)
class LabelledImages:
    """Pictures with class labels.

    labels: (N,) int64 in 0..C-1.  class_names: C names.  images: names of `files`, or a uint8 array (., H, W) of gray
    pictures.  places: (N,) where in `images` the samples are; None: they are all of them, in order.  whole: the set of
    which these are a part, with which they share `images`, if any.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    files: Files | None = None
    whole: "LabelledImages | None" = None
    places: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int, size: int) -> Tensor:
        """One picture, uint8 (3, H, W); a JPEG may come reduced, never below `size` pixels on its short side.

        BadPicture names a file that cannot be read.
        """
        if self.files is None:
            return torch.from_numpy(np.asarray(self.image(index))).expand(3, -1, -1).contiguous()
        return decode(self.content(index), size, self.image(index))

    def image(self, index: int | slice) -> Any:
        """What `images` holds of a sample, or of some: names, or pictures."""
        return self.images[index if self.places is None else self.places[index]]

    @property
    def names(self) -> np.ndarray:
        """(N,) strings."""
        return self.image(slice(None))

    def content(self, index: int) -> bytes:
        """The file of one picture. BadPicture where there is none or a link leads out of the root."""
        assert self.files is not None
        try:
            return self.files.read(self.image(index))
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            reason = error.strerror or str(error)
            raise BadPicture([(self.image(index), reason)]) from None

    def rows(self, keep: np.ndarray) -> "LabelledImages":
        """Some of the samples (a mask or indices), the classes as they are."""
        index = np.flatnonzero(keep) if keep.dtype == bool else keep
        places = index if self.places is None else self.places[index]
        return replace(self, labels=self.labels[index], whole=self.whole or self, places=places)

    def apart(self) -> "LabelledImages":
        """As a set of its own."""
        return replace(self, images=self.names, whole=None, places=None)

    def of_classes(self, classes: np.ndarray) -> "LabelledImages":
        """The samples of some classes, which are numbered anew in the order given."""
        number = np.full(len(self.class_names), -1)
        number[classes] = np.arange(len(classes))
        kept = self.rows(number[self.labels] >= 0)
        names = tuple(self.class_names[c] for c in classes)
        return replace(kept, labels=number[kept.labels], class_names=names)

    def digest(self, stamps: bool = False) -> str:
        """Tells two sets apart: sha256 over names (or the pictures themselves), labels and class names.

        stamps: also over sizes and times of change of the files.
        """
        h = hashlib.sha256(repr(self.class_names).encode() + self.labels.tobytes())
        if self.files is None:
            h.update(self.names.tobytes())
        else:
            for start in range(0, len(self), CHUNK):
                names = self.image(slice(start, start + CHUNK)).tolist()
                h.update("\0".join(names).encode())
                if stamps:
                    h.update("\0".join(map(self.files.stamp, names)).encode())
        return h.hexdigest()[:16]


@dataclass(frozen=True)
class Collection:
    """A set as it is published or handed in: pictures, and what is said of their use.

    test, validation: ids of the classes to test and to validate on; None: not said.
    role: (N,) QUERY, GALLERY or NEITHER in validation and test; None: of no sample. Classes without any query are
    retrieved among themselves.
    lists: further tests, name -> class ids.  draws: the gallery of a test is one image of each class, drawn so often,
    and metrics are the means over the draws; 0: not so.
    """

    images: LabelledImages
    test: np.ndarray | None = None
    validation: np.ndarray | None = None
    role: np.ndarray | None = None
    lists: Mapping[str, np.ndarray] = field(default_factory=dict)
    draws: int = 0

    def without(self, bad: np.ndarray) -> "Collection":
        """Some samples (a mask) left out, and the classes that then have none. ValueError if none are left."""
        if not bad.any():
            return self
        kept = self.images.rows(~bad)
        left = np.unique(kept.labels)
        if len(left) == 0:
            raise ValueError("no picture of the set can be read")

        def of(classes: np.ndarray) -> np.ndarray:
            return np.searchsorted(left, np.intersect1d(classes, left))

        return replace(
            self,
            images=kept.of_classes(left).apart(),
            test=None if self.test is None else of(self.test),
            validation=None if self.validation is None else of(self.validation),
            role=None if self.role is None else self.role[~bad],
            lists={name: of(classes) for name, classes in self.lists.items()},
        )


class Retrieval(NamedTuple):
    """A retrieval task over one set of classes. No gallery: every sample is a query against all the others, or, with
    `draws`, against a gallery of one sample of each class, drawn so often."""

    query: LabelledImages
    gallery: LabelledImages | None = None
    draws: int = 0


class Splits(NamedTuple):
    """Sets of classes, of which train, validation and the tests share none. tests: by the prefix of their metrics."""

    train: LabelledImages
    validation: Retrieval | None
    tests: dict[str, Retrieval]


def split(
    collection: Collection,
    test_fraction: float = 0.5,
    validation_fraction: float = 0.2,
    seed: int = 0,
    fold: tuple[int, int] | None = None,
    limit_classes: int | None = None,
) -> Splits:
    """Class-disjoint splits.

    Classes to test on that the collection does not name are drawn by `seed`, and so are, of the others, those to
    validate on: a fraction (at least one class; none for 0), or with `fold` (i, k) the i-th of k equal parts.
    limit_classes: at most so many classes to test on, and so many to train and validate on. The `whole` of the splits
    is then what is left; else it does not depend on the seed.
    ValueError where fewer than two training classes or no test class are left.
    """
    images, role = collection.images, collection.role
    classes = np.arange(len(images.class_names))
    test = collection.test
    if test is None:
        test = np.sort(np.random.default_rng(seed).permutation(len(classes))[: round(len(classes) * test_fraction)])
    rng = np.random.default_rng(seed)
    others = rng.permutation(np.setdiff1d(classes, test))[:limit_classes]
    if collection.validation is not None:
        validation = np.intersect1d(others, collection.validation)
    elif fold is not None:
        validation = np.sort(np.array_split(others, fold[1])[fold[0]])
    else:
        validation = np.sort(others[: max(1, round(validation_fraction * len(others))) if validation_fraction else 0])
    train = np.setdiff1d(others, validation)
    test = np.sort(rng.permutation(test)[:limit_classes])
    if len(train) < 2 or len(test) == 0:
        raise ValueError(
            f"{len(classes)} classes give {len(train)} to train, {len(validation)} to validate and "
            f"{len(test)} to test on; at least 2 to train and 1 to test on are needed"
        )
    if limit_classes:
        used = np.isin(images.labels, [*train, *validation, *test])
        role = None if role is None else role[used]
        images = images.rows(used).apart()

    def retrieval(wanted: np.ndarray, draws: int = 0) -> Retrieval:
        chosen = images.of_classes(wanted)
        if role is None or not (role[chosen.places] == QUERY).any():
            return Retrieval(chosen, draws=draws)
        kind = role[chosen.places]
        return Retrieval(chosen.rows(kind == QUERY), chosen.rows(kind == GALLERY))

    tests = {"test": retrieval(test, collection.draws)}
    for name, listed in collection.lists.items():
        tests[f"test_{name}"] = retrieval(np.intersect1d(listed, test), collection.draws)
    return Splits(images.of_classes(train), retrieval(validation) if len(validation) else None, tests)
