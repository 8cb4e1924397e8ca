"""What is wrong with a set: pictures that cannot be read, pictures on both sides of a split, counts that are off."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from dml_core.data import datasets
from dml_core.data.benchmarks import BENCHMARKS, counts
from dml_core.data.datasets import LabelledImages
from dml_core.data.pictures import BadPicture, decode
from pipelines import build
from pipelines.sections import Data

AT_ONCE = 512


class Seen(NamedTuple):
    """Of each picture: bad, the reason why it cannot be read, or None; content, a hash of the file."""

    bad: list[str | None]
    content: list[bytes]


def look(images: LabelledImages, note: Callable[[int], object] = lambda done: None) -> Seen:
    """Decode every picture, in as many threads as there are CPUs."""

    def one(index: int) -> tuple[str | None, bytes]:
        try:
            content = images.content(index)
            decode(content, 8, images.images[index])
        except BadPicture as error:
            return error.bad[0][1], b""
        return None, hashlib.sha256(content).digest()

    seen: list[tuple[str | None, bytes]] = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for start in range(0, len(images), AT_ONCE):
            seen += threads.map(one, range(start, min(start + AT_ONCE, len(images))))
            note(len(seen))
    return Seen([bad for bad, _ in seen], [content for _, content in seen])


def unreadable(config: Data, console: Console) -> list[str]:
    """Names of the pictures to leave out. With on_bad_image=skip all are looked at, once: the outcome is kept on disk
    until a file changes."""
    if config.on_bad_image == "fail" or config.name == "glyphs":
        return []
    images = build.collection(config).images
    kept = build.cache_folder() / "unreadable" / f"{images.digest(stamps=True)}.json"
    if kept.is_file():
        found = json.loads(kept.read_text())
    else:
        with console.status("") as status:
            seen = look(images, lambda done: status.update(f"looking at {done:,} of {len(images):,} pictures"))
        found = [name for name, bad in zip(images.images.tolist(), seen.bad, strict=True) if bad]
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
        collection = build.collection(config)
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
        with console.status("") as status:
            seen = look(images, lambda done: status.update(f"reading {done:,} of {len(images):,} pictures"))
        names = images.images.tolist()
        bad = {name: reason for name, reason in zip(names, seen.bad, strict=True) if reason}
        problems += [f"unreadable: {name}: {reason}" for name, reason in bad.items()]
        tested = np.zeros(len(images), bool)
        for part in (part for task in splits.tests.values() for part in (task.query, task.gallery) if part):
            tested[part.places] = True
        twins = _on_both_sides(names, seen.content, tested.tolist())
        problems += [f"the same picture in train and test: {one} and {other}" for one, other in twins]
        report |= {"unreadable": bad, "in_train_and_test": twins}
    return report | {"problems": problems}


def _on_both_sides(names: Sequence[str], content: Sequence[bytes], tested: Sequence[bool]) -> list[tuple[str, str]]:
    """(training picture, the same among the test pictures) for each content that lies on both sides."""
    trained = {c: name for name, c, test in zip(names, content, tested, strict=True) if c and not test}
    return [(trained[c], name) for name, c, test in zip(names, content, tested, strict=True) if test and c in trained]
