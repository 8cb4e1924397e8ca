"""What is wrong with a set: pictures that cannot be read, pictures on both sides of a split, counts that are off."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from dml_core.data import datasets
from dml_core.data.benchmarks import BENCHMARKS, counts
from dml_core.data.datasets import LabelledImages
from dml_core.data.pictures import BadPicture, decode
from pipelines.config.sections import Data
from pipelines.data.sets import cache_folder, load_collection

AT_ONCE = 512


class Seen(NamedTuple):
    """bad: name -> why it cannot be read.  content: of each picture a hash of its file; empty for a bad one."""

    bad: dict[str, str]
    content: list[bytes]


def look(images: LabelledImages, console: Console) -> Seen:
    """Decode every picture, in as many threads as there are CPUs."""
    seen = Seen({}, [])

    def one(index: int) -> bytes:
        try:
            content = images.content(index)
            decode(content, 8, images.image(index))
        except BadPicture as error:
            seen.bad.update(error.bad)
            return b""
        return hashlib.sha256(content).digest()

    with console.status("") as status, ThreadPoolExecutor(os.cpu_count()) as threads:
        for start in range(0, len(images), AT_ONCE):
            seen.content.extend(threads.map(one, range(start, min(start + AT_ONCE, len(images)))))
            status.update(f"reading {len(seen.content):,} of {len(images):,} pictures")
    return seen._replace(bad={name: seen.bad[name] for name in images.names.tolist() if name in seen.bad})


def unreadable(config: Data, console: Console, labelled: bool = True) -> list[str]:
    """Names of the pictures to leave out. With on_bad_image=skip all are looked at, once: the outcome is kept on disk
    until a file changes. labelled: see build.collection."""
    if config.on_bad_image == "fail" or config.name == "glyphs":
        return []
    images = load_collection(config, labelled=labelled).images
    kept = cache_folder() / "unreadable" / f"{images.digest(stamps=True)}.json"
    if kept.is_file():
        found = json.loads(kept.read_text())
    else:
        found = [*look(images, console).bad]
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(found))
        os.replace(partial, kept)
    if found:
        console.print(f"{len(found)} unreadable pictures are left out, {found[0]} first", highlight=False)
    return found


def check(config: Data, pictures: bool, console: Console) -> dict[str, Any]:
    """What there is, and `problems`, a list of lines. pictures: also read them all."""
    with console.status("reading the lists"):
        collection = load_collection(config)
        splits = datasets.split(collection, config.test_fraction or 0.5, 0.0, config.split_seed)
    images = collection.images
    found = counts(splits)
    expected = BENCHMARKS[config.name].expected if config.name in BENCHMARKS else {}
    problems = [f"{k}: {found.get(k)}, but the published set has {n}" for k, n in expected.items() if found.get(k) != n]
    if (alone := np.bincount(images.labels) == 1).any():
        first = images.class_names[int(alone.argmax())]
        problems.append(f"{alone.sum()} classes have one image alone, {first} first: it can be no query's match")
    report: dict[str, Any] = {"data": config.name, "digest": images.digest(), "counts": found, "expected": expected}
    if pictures and images.files is not None:
        seen = look(images, console)
        problems += [f"unreadable: {name}: {reason}" for name, reason in seen.bad.items()]
        tested = np.zeros(len(images), bool)
        for part in (part for task in splits.tests.values() for part in (task.query, task.gallery) if part):
            tested[part.places] = True
        twins = _on_both_sides(images.names.tolist(), seen.content, tested.tolist())
        problems += [f"the same picture in train and test: {one} and {other}" for one, other in twins]
        report |= {"unreadable": seen.bad, "in_train_and_test": twins}
    return report | {"problems": problems}


def _on_both_sides(names: Sequence[str], content: Sequence[bytes], tested: Sequence[bool]) -> list[tuple[str, str]]:
    """(training picture, the same among the test pictures) for each content that lies on both sides."""
    trained = {c: name for name, c, test in zip(names, content, tested, strict=True) if c and not test}
    return [(trained[c], name) for name, c, test in zip(names, content, tested, strict=True) if test and c in trained]
