"""Labelled pictures, their roles in test and validation, and class-disjoint splits of them."""

import errno
import hashlib
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.dtypes import StringDType

from dml_core.data.files import Files
from dml_core.data.pictures import BadPicture, Box, decode

if TYPE_CHECKING:  # lists of pictures are read without torch
    from torch import Tensor

LOGGER = logging.getLogger(__name__)

NEITHER, QUERY, GALLERY, BOTH = 0, 1, 2, 3  # roles of a sample in validation and test
OUT_OF_MEANS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # which are no fault of the file that is read
CHUNK = 2**17  # names that become Python strings at a time
READERS = 16  # threads that read files, where their content alone tells whether they change


def names_array(names: list[str]) -> np.ndarray:
    """Return names as an array (N,) of NumPy's type for strings, which takes 16 bytes a name and its letters."""
    return np.array(names, dtype=StringDType())


@dataclass(frozen=True)
class LabelledImages:
    """Pictures with class labels.

    Attributes:
        images: Names of files, or a uint8 array (., H, W) of gray pictures.
        labels: (N,) int64 in 0..C-1.
        class_names: C names.
        files: Where named files are read from; None: `images` are the pictures themselves.
        whole: The set that these samples are a part of, and share `images` with, if any.
        places: (N,) positions of the samples in `images`; None: all, in order.
        cameras: (N,) int64, the camera (or sequence) of each sample, -1 where it has none; None: no sample has one.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    files: Files | None = None
    whole: "LabelledImages | None" = None
    places: np.ndarray | None = None
    cameras: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int, size: int, part: Callable[[int, int], Box] | None = None) -> "Tensor":
        """Read and decode the picture of a sample.

        Args:
            index: The sample.
            size: Pixels that are needed on the short side; a JPEG may be reduced to no less.
            part: Tells which part of a picture (height, width) is needed; None: all of it.

        Returns:
            uint8 (3, H, W).

        Raises:
            BadPicture: The file cannot be read; the error names it.
        """
        if self.files is None:
            import torch

            pixels = np.asarray(self.entry(index))
            if part is not None:
                top, left, height, width = part(*pixels.shape)
                pixels = pixels[top : top + height, left : left + width]
            return torch.from_numpy(pixels).expand(3, -1, -1).contiguous()
        return decode(self.read_file(index), size, self.entry(index), part)

    def entry(self, index: int | slice | np.ndarray) -> Any:
        """Return the entry of `images` for a sample, or those of several: file names, or gray pictures."""
        return self.images[index if self.places is None else self.places[index]]

    @property
    def names(self) -> np.ndarray:
        """The entries of all samples, (N,): file names, where there are files."""
        return self.entry(slice(None))

    def read_file(self, index: int) -> bytes:
        """Read the file of a sample.

        Raises:
            BadPicture: It cannot be read, whatever the reason; the error names it.
            ConnectionError, TimeoutError: No file can be read now.
            OSError: This process has no means left to read a file.
        """
        assert self.files is not None
        try:
            return self.files.read(self.entry(index))
        except (ConnectionError, TimeoutError):
            raise
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in OUT_OF_MEANS:
                raise
            reason = getattr(error, "strerror", None) or str(error)
            raise BadPicture([(self.entry(index), reason)]) from None

    def select(self, keep: np.ndarray) -> "LabelledImages":
        """Select some of the samples (a mask or indices); the classes stay as they are."""
        index = np.flatnonzero(keep) if keep.dtype == bool else keep
        places = index if self.places is None else self.places[index]
        cameras = None if self.cameras is None else self.cameras[index]
        return replace(self, labels=self.labels[index], whole=self.whole or self, places=places, cameras=cameras)

    def standalone(self) -> "LabelledImages":
        """Return the same samples as a set of their own, which is no part of another one."""
        return replace(self, images=self.names, whole=None, places=None)

    def select_classes(self, classes: np.ndarray) -> "LabelledImages":
        """Select the samples of some classes, which are numbered anew in the order of `classes`."""
        number = np.full(len(self.class_names), -1)
        number[classes] = np.arange(len(classes))
        kept = self.select(number[self.labels] >= 0)
        names = tuple(self.class_names[c] for c in classes)
        return replace(kept, labels=number[kept.labels], class_names=names)

    def digest(self) -> str:
        """Return 16 hex digits of what is listed: names (or embedded pictures), labels and class names."""
        h = hashlib.sha256(repr(self.class_names).encode() + self.labels.tobytes())
        if self.files is None:
            h.update(self.names.tobytes())
        else:
            _hash_texts(h, self.names)
        return h.hexdigest()[:16]

    def stamps(self, tell: Callable[[str], object]) -> np.ndarray:
        """Return a text for each file, (N,) strings, that changes when the file does: size and time, or an ETag.

        Args:
            tell: Called with a line where contents must be read to know.

        Raises:
            ConnectionError: A server does not answer.
        """
        assert self.files is not None
        stamps = self.files.stamps(self.names)
        unknown = np.flatnonzero(stamps == "")
        if unknown.size:
            tell(
                f"{self.files.root}: neither an ETag nor a time of change is told of {unknown.size} pictures; they are "
                "read once, to know them again"
            )
            with ThreadPoolExecutor(READERS) as threads:
                stamps[unknown] = np.array([*threads.map(self._hash_file, unknown.tolist())], StringDType())
        return stamps

    def _hash_file(self, index: int) -> str:
        try:
            return hashlib.sha256(self.read_file(index)).hexdigest()
        except BadPicture:
            return "missing"


def _hash_texts(h: "hashlib._Hash", texts: np.ndarray) -> None:
    """Add texts, (N,) strings, to a hash."""
    for start in range(0, len(texts), CHUNK):
        h.update("\0".join(texts[start : start + CHUNK].tolist()).encode())


class SetIdentity(NamedTuple):
    """What tells a set from all others: the same where a folder has only moved, another where a file has changed.

    Attributes:
        digest: 16 hex digits of `pictures`, and of how they are used: roles, cameras, test and validation classes.
        pictures: 16 hex digits of `listing`, and of each file's size and time of change, or ETag.
        listing: LabelledImages.digest().
        classes, images: How many there are.
    """

    digest: str
    pictures: str
    listing: str
    classes: int
    images: int

    def __str__(self) -> str:
        return f"{self.digest} ({self.classes:,} classes, {self.images:,} pictures)"


@dataclass(frozen=True)
class Collection:
    """A set as its source describes it: pictures, and how they are to be used.

    Attributes:
        images: The pictures.
        test: Ids of the classes to test on; None: they are to be drawn.
        validation: Ids of the classes to validate on; None: they are to be drawn.
        role: (N,) QUERY, GALLERY, BOTH or NEITHER in validation and test; None: no sample has a role. Classes without
            any query are retrieved among themselves.
        lists: Further tests, name -> class ids.
        draws: The gallery of a test is one image of each class, drawn so often, and metrics are means over the draws;
            0: the gallery is not drawn.
        passed_over: Files that are no samples: why -> how many.
        unreadable: Entries of which it cannot even be told whether they are samples: name -> why.
        notes: Lines that a user should read: how the source was understood, what was passed over.
    """

    images: LabelledImages
    test: np.ndarray | None = None
    validation: np.ndarray | None = None
    role: np.ndarray | None = None
    lists: Mapping[str, np.ndarray] = field(default_factory=dict)
    draws: int = 0
    passed_over: Mapping[str, int] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def identity(self, tell: Callable[[str], object] = LOGGER.info) -> SetIdentity:
        """Return what tells this set from all others.

        Args:
            tell: Called with a line where contents must be read to know the files again.

        Raises:
            ConnectionError: A server does not answer.
        """
        images = self.images
        listing = images.digest()
        h = hashlib.sha256(listing.encode())
        if images.files is not None:
            _hash_texts(h, images.stamps(tell))
        pictures = h.hexdigest()[:16]
        lists = {f"list {name}": classes for name, classes in self.lists.items()}
        uses = {"test": self.test, "validation": self.validation, "role": self.role, "camera": images.cameras, **lists}
        h = hashlib.sha256(f"{pictures} {self.draws}".encode())
        for name, use in uses.items():
            if use is not None:
                h.update(f"{name} {len(use)} ".encode() + np.asarray(use, np.int64).tobytes())
        return SetIdentity(h.hexdigest()[:16], pictures, listing, len(images.class_names), len(images))

    def without(self, bad: np.ndarray) -> "Collection":
        """Leave out unreadable samples, and the classes that then have none.

        Args:
            bad: (N,) mask of the samples to leave out.

        Returns:
            The rest; the collection itself where nothing is left out.

        Raises:
            ValueError: No sample remains.
        """
        if not bad.any():
            return self
        kept = self.images.select(~bad)
        classes_kept = np.unique(kept.labels)
        if len(classes_kept) == 0:
            raise ValueError("no picture of the set can be read")

        def renumber(classes: np.ndarray) -> np.ndarray:
            return np.searchsorted(classes_kept, np.intersect1d(classes, classes_kept))

        return replace(
            self,
            images=kept.select_classes(classes_kept).standalone(),
            test=None if self.test is None else renumber(self.test),
            validation=None if self.validation is None else renumber(self.validation),
            role=None if self.role is None else self.role[~bad],
            lists={name: renumber(classes) for name, classes in self.lists.items()},
        )


class Retrieval(NamedTuple):
    """A retrieval task over one set of classes.

    Attributes:
        query: The queries.
        gallery: The gallery. None: every sample is a query against all the others or, with `draws`, against a gallery
            of one sample of each class.
        draws: How often that gallery is drawn.
    """

    query: LabelledImages
    gallery: LabelledImages | None = None
    draws: int = 0

    def query_positions(self) -> np.ndarray:
        """Return where each query stands in a gallery of its own, (N,) int64; -1: it is not part of it."""
        query, gallery = self.query.places, self.gallery.places if self.gallery else None
        if query is None or gallery is None or self.gallery is None or self.query.whole is not self.gallery.whole:
            return np.full(len(self.query), -1)
        order = np.argsort(gallery)
        place = np.searchsorted(gallery, query, sorter=order)
        position = order[np.minimum(place, len(order) - 1)]
        return np.where(gallery[position] == query, position, -1)


class Splits(NamedTuple):
    """The parts of a set; training, validation and tests share no class.

    Attributes:
        train: The samples to train on.
        validation: The task to validate on, if any.
        tests: The tests, by the prefix of their metrics: test, test_small, ...
        notes: See Collection.
    """

    train: LabelledImages
    validation: Retrieval | None
    tests: dict[str, Retrieval]
    notes: tuple[str, ...] = ()


def split(
    collection: Collection,
    test_fraction: float = 0.5,
    validation_fraction: float = 0.2,
    seed: int = 0,
    fold: tuple[int, int] | None = None,
    limit_classes: int | None = None,
    trains: bool = True,
) -> Splits:
    """Split a collection by classes.

    Classes to test and to validate on that the collection does not name are drawn by `seed`.

    Args:
        collection: The set.
        test_fraction: The share of the classes that are tested on.
        validation_fraction: The share of the other classes that are validated on: at least one class, or none for 0.
        seed: Seed of the draws.
        fold: (i, k): instead of a fraction, the i-th of k equal parts of the other classes is validated on.
        limit_classes: At most so many classes are tested on, and at most so many trained and validated on. The `whole`
            of the splits has only these; without a limit it does not depend on the seed.
        trains: Whether there must be classes to train on; who only tests needs none.

    Returns:
        The parts.

    Raises:
        ValueError: There are fewer than two training classes, or no test class; or queries have no gallery.
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
    if trains and (len(train) < 2 or len(test) == 0):
        drawn = "data.test_fraction is the share to test on" if collection.test is None else "the set itself says which"
        raise ValueError(
            f"{len(classes)} classes give {len(train)} to train, {len(validation)} to validate and "
            f"{len(test)} to test on; at least 2 to train and 1 to test on are needed; {drawn}"
        )
    if len(test) == 0:
        raise ValueError(f"none of the {len(classes)} classes is one to test on")
    if limit_classes:
        used = np.isin(images.labels, [*train, *validation, *test])
        role = None if role is None else role[used]
        images = images.select(used).standalone()

    def retrieval(task_classes: np.ndarray, draws: int = 0) -> Retrieval:
        samples = images.select_classes(task_classes)
        if role is None or not np.isin(role[samples.places], (QUERY, BOTH)).any():
            return Retrieval(samples, draws=draws)
        query, gallery = (np.isin(role[samples.places], (one, BOTH)) for one in (QUERY, GALLERY))
        if not gallery.any():
            raise ValueError(
                f"{query.sum()} pictures have the role query and none the role gallery; without any role each is a "
                "query against all the others"
            )
        return Retrieval(samples.select(query), None if (query & gallery).all() else samples.select(gallery))

    tests = {"test": retrieval(test, collection.draws)}
    for name, listed in collection.lists.items():
        tests[f"test_{name}"] = retrieval(np.intersect1d(listed, test), collection.draws)
    validated = retrieval(validation) if len(validation) else None
    return Splits(images.select_classes(train), validated, tests, collection.notes)
