"""What is wrong with a set: pictures that cannot be read, pictures on both sides of a split, counts that are off."""

import errno
import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
from rich.console import Console

from dml_core.cpus import usable_cpus
from dml_core.data import datasets
from dml_core.data.benchmarks import BENCHMARKS, count_parts
from dml_core.data.datasets import LabelledImages, Retrieval, SetIdentity
from dml_core.data.pictures import BadPicture, decode
from pipelines.config.identity import require_same_pictures, with_absolute_places
from pipelines.config.sections import Data
from pipelines.console import stage
from pipelines.data.sets import cache_folder, identify, load_collection, named_by
from pipelines.files import write_atomically
from pipelines.kept import keep_meanwhile

PICTURES_BETWEEN_MESSAGES = 512
MOST_LINES = 20  # of one kind of problem


class Reading(NamedTuple):
    """What came of reading every picture of a set.

    Attributes:
        reasons: Name of each unreadable picture -> why it cannot be read.
        contents: (N,) int64: the same number for pictures whose files have the same bytes; -1 for unreadable ones.
    """

    reasons: dict[str, str]
    contents: np.ndarray


class Copies(TypedDict):
    """How many queries of a test have a copy in their gallery.

    Attributes:
        queries: All queries.
        same_label, other_label: Those with a copy of the same label, which they find, and of another, if not of both.
    """

    queries: int
    same_label: int
    other_label: int


class SetReport(TypedDict):
    """What `dml data check --json` prints.

    Attributes:
        data: Name of the set.
        digest: Of its pictures and how they are used; that of a run, see datasets.SetIdentity.
        counts, expected: Classes and images by part; and as published, for a benchmark.
        passed_over: Files that are none of the set's: why -> how many.
        notes: Lines on how the set was understood.
        without_match: Queries whose gallery has no picture of their label, by test.
        unreadable, in_train_and_test: See Reading.reasons; pairs of equal pictures. Only where pictures were read, as
            the next two.
        under_several_labels: Names of pictures that are the same and have different labels, together.
        copies_in_gallery: By test.
        problems: Lines that say what is wrong.
    """

    data: str
    digest: str
    counts: dict[str, int]
    expected: Mapping[str, int]
    passed_over: Mapping[str, int]
    notes: Sequence[str]
    without_match: dict[str, int]
    unreadable: NotRequired[dict[str, str]]
    in_train_and_test: NotRequired[list[tuple[str, str]]]
    under_several_labels: NotRequired[list[list[str]]]
    copies_in_gallery: NotRequired[dict[str, Copies]]
    problems: list[str]


def read_pictures(images: LabelledImages, console: Console) -> Reading:
    """Decode every picture, in as many threads as there are CPUs."""
    reasons, hashes = dict[str, str](), list[bytes]()

    def hash_of(index: int) -> bytes:
        try:
            content = images.read_file(index)
            decode(content, 8, images.entry(index))
        except BadPicture as error:
            reasons.update(error.bad)
            return b""
        return hashlib.sha256(content).digest()

    with console.status("") as status, ThreadPoolExecutor(usable_cpus()) as threads:
        for start in range(0, len(images), PICTURES_BETWEEN_MESSAGES):
            hashes.extend(threads.map(hash_of, range(start, min(start + PICTURES_BETWEEN_MESSAGES, len(images)))))
            status.update(f"reading {len(hashes):,} of {len(images):,} pictures")
    numbers: dict[bytes, int] = {b"": -1}
    contents = np.array([numbers.setdefault(content, len(numbers)) for content in hashes], np.int64)
    return Reading({name: reasons[name] for name in images.names.tolist() if name in reasons}, contents)


def identify_again(
    config: Data, name: str, begun: Mapping[str, Any] | None, path: str, console: Console
) -> SetIdentity:
    """Return what the set of a run or sweep is, and refuse to go on over another than it was begun with.

    Args:
        config: Of the set.
        name: How the run or sweep is named on the command line, such as name=x.
        begun: What its folder remembers, with the set's identity as "data"; None: it begins now.
        path: Its folder, for the message.
        console: Where progress is told.

    Raises:
        ValueError: The set is another one, or missing.
    """
    tell = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    with stage(console, "reading the data"):
        data = identify(config, tell)
    if begun and "data" in begun:
        require_same_pictures(name, data, SetIdentity(**begun["data"]), path)
    elif begun:
        tell(f"{name} was begun by an earlier version; whether its pictures are still the same is not known")
    return data


def unreadable_pictures(config: Data, data: SetIdentity, console: Console, labelled: bool = True) -> tuple[str, ...]:
    """List the pictures to leave out, by name; none with on_bad_image=fail.

    With on_bad_image=skip all are read, once: the outcome is kept on disk until a file changes.

    Args:
        config: Of the set.
        data: What the set is now, see sets.identify.
        console: Where progress and the number of pictures are told.
        labelled: See load_collection.
    """
    if config.on_bad_image == "fail" or config.name == "glyphs":
        return ()
    collection = load_collection(config, labelled=labelled)
    cache = cache_folder() / "unreadable" / f"{data.pictures}.json"
    if cache.is_file():
        names = tuple(json.loads(cache.read_text()))
    else:
        names = tuple(read_pictures(collection.images, console).reasons)
        write_atomically(cache, json.dumps(names))
    names = (*collection.unreadable, *names)
    if names:
        console.print(f"{len(names)} unreadable pictures are left out, {names[0]} first", highlight=False)
    return names


def require_pictures(images: LabelledImages) -> None:
    """Read a few pictures of a set, so that a run whose root is wrong ends before any worker starts.

    Raises:
        ValueError: None of them can be read.
    """
    if images.files is None:
        return
    reasons = dict[str, str]()
    for index in sorted({0, len(images) // 2, len(images) - 1}):
        try:
            images.read_file(index)
            return
        except BadPicture as error:
            reasons.update(error.bad)
    name, reason = next(iter(reasons.items()))
    raise ValueError(
        f"data.root={images.files.root}: {name} cannot be read ({reason}), nor can others; are the names relative to "
        f"another folder?"
    )


def check_set(config: Data, pictures: bool, console: Console) -> SetReport:
    """Count a set's classes and images, and list what is wrong with it.

    Args:
        config: Of the set.
        pictures: Whether every picture is read, too.
        console: Where progress is told.
    """
    config = with_absolute_places(config).model_copy(update={"on_bad_image": "skip"})
    with keep_meanwhile(), console.status("reading the lists"):
        collection = load_collection(config)
        digest = identify(config, partial(console.print, highlight=False, markup=False, soft_wrap=True)).digest
        with named_by(config):
            splits = datasets.split(collection, config.fractions[0], 0.0, config.split_seed, trains=False)
    images = collection.images
    counted = count_parts(splits)
    if splits.validation:
        everyone = [_places(part) for part in (splits.validation.query, splits.validation.gallery) if part]
        counted["validation_classes"] = len(splits.validation.query.class_names)
        counted["validation_images"] = len(np.unique(np.concatenate(everyone)))
    expected = BENCHMARKS[config.name].expected if config.name in BENCHMARKS else {}
    problems = [
        f"{key}: {counted.get(key)}, but the published set has {count}"
        for key, count in expected.items()
        if counted.get(key) != count
    ]
    if len(splits.train.class_names) < 2:
        problems.append(
            f"{len(splits.train.class_names)} classes to train on: enough for dml evaluate, not for dml train"
        )
    if (single := np.bincount(images.labels) == 1).any():
        first = images.class_names[int(single.argmax())]
        problems.append(f"{single.sum()} classes have one image alone, {first} first: it can be no query's match")
    without_match = {name: int(lacks_match(task).sum()) for name, task in splits.tests.items() if not task.draws}
    problems += [
        f"{name}: {count} of {len(splits.tests[name].query)} queries have no match in their gallery: it has no other "
        f"picture of their label{'' if images.cameras is None else ' by another camera'}"
        for name, count in without_match.items()
        if count
    ]
    problems += _first(
        [f"unreadable: {name}: {reason}" for name, reason in collection.unreadable.items()], "unreadable entries"
    )
    report = SetReport(
        data=config.name,
        digest=digest,
        counts=counted,
        expected=expected,
        passed_over=collection.passed_over,
        notes=collection.notes,
        without_match=without_match,
        problems=problems,
    )
    if pictures and images.files is not None:
        reading = read_pictures(images, console)
        problems += _first([f"unreadable: {name}: {reason}" for name, reason in reading.reasons.items()], "unreadable")
        if [*reading.reasons.values()].count(os.strerror(errno.ENOENT)) == len(images):
            root = images.files.root
            problems.append(
                f"there is none of the pictures: are their names relative to another folder than data.root={root}?"
            )
        is_tested = np.zeros(len(images), bool)
        for part in (part for task in splits.tests.values() for part in (task.query, task.gallery) if part):
            is_tested[part.places] = True
        pairs = _in_train_and_test(images.names.tolist(), reading.contents.tolist(), is_tested.tolist())
        problems += _first(
            [f"the same picture in train and test: {one} and {other}" for one, other in pairs], "such pairs"
        )
        several = _under_several_labels(images, reading.contents)
        problems += _first([_describe_several_labels(images, group) for group in several], "such pictures")
        copies = {name: _copies_in_gallery(task, reading.contents) for name, task in splits.tests.items()}
        problems += [line for name, counts in copies.items() for line in _describe_copies(name, counts)]
        report["unreadable"] = dict(collection.unreadable) | reading.reasons
        report["in_train_and_test"] = pairs
        report["under_several_labels"] = [images.names[group].tolist() for group in several]
        report["copies_in_gallery"] = copies
    return report


def _first(lines: list[str], noun: str) -> list[str]:
    """Return the first lines, and one that counts the others."""
    more = len(lines) - MOST_LINES
    return [*lines[:MOST_LINES], f"{more:,} more {noun}, which --json names"] if more > 0 else lines


def _places(images: LabelledImages) -> np.ndarray:
    """Return the positions of samples in the whole set."""
    return np.arange(len(images)) if images.places is None else images.places


def lacks_match(task: Retrieval) -> np.ndarray:
    """Return for each query whether its gallery has no other picture of its label, or none by another camera: (Q,)."""
    query, gallery = task.query, task.gallery or task.query
    matches = np.bincount(gallery.labels, minlength=len(query.class_names))[query.labels]
    itself = np.isin(_places(query), _places(gallery))
    if query.cameras is None or gallery.cameras is None:
        return matches - itself < 1
    by_camera = Counter(zip(gallery.labels.tolist(), gallery.cameras.tolist(), strict=True))
    pairs = zip(query.labels.tolist(), query.cameras.tolist(), strict=True)
    left_out = np.array([by_camera[pair] for pair in pairs], np.int64)
    return matches - np.where(query.cameras < 0, itself, left_out) < 1


def _in_train_and_test(
    names: Sequence[str], contents: Sequence[int], is_tested: Sequence[bool]
) -> list[tuple[str, str]]:
    """Pair each test picture with a training picture of the same content."""
    pictures = [*zip(names, contents, is_tested, strict=True)]
    trained = {content: name for name, content, tested in pictures if content >= 0 and not tested}
    return [(trained[content], name) for name, content, tested in pictures if tested and content in trained]


def _under_several_labels(images: LabelledImages, contents: np.ndarray) -> list[np.ndarray]:
    """Return the samples of each content that comes with different labels."""
    readable = np.flatnonzero(contents >= 0)
    repeated = readable[np.bincount(contents[readable])[contents[readable]] > 1] if len(readable) else readable
    order = repeated[np.argsort(contents[repeated], kind="stable")]
    groups = np.split(order, np.flatnonzero(np.diff(contents[order])) + 1)
    return [group for group in groups if len(np.unique(images.labels[group])) > 1]


def _describe_several_labels(images: LabelledImages, group: np.ndarray) -> str:
    listed = [f"{images.entry(sample)} ({images.class_names[images.labels[sample]]})" for sample in group.tolist()]
    more = f", and {len(listed) - 4} more" if len(listed) > 4 else ""
    labels = len(np.unique(images.labels[group]))
    return f"the same picture under {labels} labels: {', '.join(listed[:4])}{more}"


def _copies_in_gallery(task: Retrieval, contents: np.ndarray) -> Copies:
    """Count the queries that have a copy in their gallery. contents: of all samples of the set."""
    query, gallery = task.query, task.gallery or task.query
    cameras = gallery.cameras if gallery.cameras is not None else np.full(len(gallery), -1)
    facts = gallery.labels, _places(gallery), cameras
    candidates = defaultdict[int, list[tuple[int, int, int]]](list)  # content -> label, place and camera of each
    for content, *of_item in zip(contents[_places(gallery)].tolist(), *(fact.tolist() for fact in facts), strict=True):
        candidates[content].append((of_item[0], of_item[1], of_item[2]))
    cameras = query.cameras if query.cameras is not None else np.full(len(query), -1)
    counts = Copies(queries=len(query), same_label=0, other_label=0)
    for content, label, place, camera in zip(
        contents[_places(query)].tolist(), query.labels.tolist(), _places(query).tolist(), cameras.tolist(), strict=True
    ):
        if content < 0:
            continue
        found = {
            other == label
            for other, at, by in candidates[content]
            if at != place and not (camera >= 0 and other == label and by == camera)
        }
        if found:
            counts["same_label" if True in found else "other_label"] += 1
    return counts


def _describe_copies(name: str, counts: Copies) -> list[str]:
    """Return lines on what copies in the gallery do to R@1."""
    effects = (("the same label", counts["same_label"], "high"), ("another label", counts["other_label"], "low"))
    return [
        f"{name}: {count} of {counts['queries']} queries have a copy of themselves in their gallery, with {label}: "
        f"R@1 may be up to {100 * count / counts['queries']:.1f} points too {effect}"
        for label, count, effect in effects
        if count
    ]
