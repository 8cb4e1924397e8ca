"""What is wrong with a set: pictures that cannot be read, pictures on both sides of a split, counts that are off."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
from rich.console import Console

from dml_core.data import datasets
from dml_core.data.benchmarks import BENCHMARKS, count_parts
from dml_core.data.datasets import LabelledImages
from dml_core.data.pictures import BadPicture, decode
from pipelines.config.sections import Data
from pipelines.data.sets import cache_folder, load_collection
from pipelines.files import write_atomically

PICTURES_BETWEEN_MESSAGES = 512


class Reading(NamedTuple):
    """What came of reading every picture of a set.

    Attributes:
        reasons: Name of each unreadable picture -> why it cannot be read.
        hashes: Of each picture's file; empty for an unreadable one.
    """

    reasons: dict[str, str]
    hashes: list[bytes]


class SetReport(TypedDict):
    """What `dml data check --json` prints.

    Attributes:
        data: Name of the set.
        digest: Of its names, sizes and labels.
        counts, expected: Classes and images by part; and as published, for a benchmark.
        unreadable, in_train_and_test: See Reading.reasons; pairs of equal pictures. Only where pictures were read.
        problems: Lines that say what is wrong.
    """

    data: str
    digest: str
    counts: dict[str, int]
    expected: Mapping[str, int]
    unreadable: NotRequired[dict[str, str]]
    in_train_and_test: NotRequired[list[tuple[str, str]]]
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

    with console.status("") as status, ThreadPoolExecutor(os.cpu_count()) as threads:
        for start in range(0, len(images), PICTURES_BETWEEN_MESSAGES):
            hashes.extend(threads.map(hash_of, range(start, min(start + PICTURES_BETWEEN_MESSAGES, len(images)))))
            status.update(f"reading {len(hashes):,} of {len(images):,} pictures")
    return Reading({name: reasons[name] for name in images.names.tolist() if name in reasons}, hashes)


def unreadable_pictures(config: Data, console: Console, labelled: bool = True) -> tuple[str, ...]:
    """List the pictures to leave out, by name; none with on_bad_image=fail.

    With on_bad_image=skip all are read, once: the outcome is kept on disk until a file changes.

    Args:
        config: Of the set.
        console: Where progress and the number of pictures are told.
        labelled: See load_collection.
    """
    if config.on_bad_image == "fail" or config.name == "glyphs":
        return ()
    images = load_collection(config, labelled=labelled).images
    cache = cache_folder() / "unreadable" / f"{images.digest(stamps=True)}.json"
    if cache.is_file():
        names = tuple(json.loads(cache.read_text()))
    else:
        names = tuple(read_pictures(images, console).reasons)
        write_atomically(cache, json.dumps(names))
    if names:
        console.print(f"{len(names)} unreadable pictures are left out, {names[0]} first", highlight=False)
    return names


def check_set(config: Data, pictures: bool, console: Console) -> SetReport:
    """Count a set's classes and images, and list what is wrong with it.

    Args:
        config: Of the set.
        pictures: Whether every picture is read, too.
        console: Where progress is told.
    """
    with console.status("reading the lists"):
        collection = load_collection(config)
        splits = datasets.split(collection, config.fractions[0], 0.0, config.split_seed)
    images = collection.images
    counted = count_parts(splits)
    expected = BENCHMARKS[config.name].expected if config.name in BENCHMARKS else {}
    problems = [
        f"{key}: {counted.get(key)}, but the published set has {count}"
        for key, count in expected.items()
        if counted.get(key) != count
    ]
    if (single := np.bincount(images.labels) == 1).any():
        first = images.class_names[int(single.argmax())]
        problems.append(f"{single.sum()} classes have one image alone, {first} first: it can be no query's match")
    report = SetReport(data=config.name, digest=images.digest(), counts=counted, expected=expected, problems=problems)
    if pictures and images.files is not None:
        reading = read_pictures(images, console)
        problems += [f"unreadable: {name}: {reason}" for name, reason in reading.reasons.items()]
        is_tested = np.zeros(len(images), bool)
        for part in (part for task in splits.tests.values() for part in (task.query, task.gallery) if part):
            is_tested[part.places] = True
        pairs = _in_train_and_test(images.names.tolist(), reading.hashes, is_tested.tolist())
        problems += [f"the same picture in train and test: {one} and {other}" for one, other in pairs]
        report["unreadable"], report["in_train_and_test"] = reading.reasons, pairs
    return report


def _in_train_and_test(
    names: Sequence[str], hashes: Sequence[bytes], is_tested: Sequence[bool]
) -> list[tuple[str, str]]:
    """Pair each test picture with a training picture of the same content."""
    pictures = [*zip(names, hashes, is_tested, strict=True)]
    trained = {content: name for name, content, tested in pictures if content and not tested}
    return [(trained[content], name) for name, content, tested in pictures if tested and content in trained]
