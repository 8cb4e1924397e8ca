"""What the texts of labels, splits and roles mean: which labels are one class, and which words name a split."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

import numpy as np

from dml_core.data.datasets import BOTH, GALLERY, NEITHER, QUERY

OPEN, TRAIN, VALIDATION, TEST = 0, 1, 2, 3  # splits; OPEN: none is named

# Word -> its split, and its role there.
SPLITS = {
    "": (OPEN, NEITHER),
    **dict.fromkeys(("train", "training", "bounding_box_train", "image_train"), (TRAIN, NEITHER)),
    **dict.fromkeys(("val", "valid", "validation"), (VALIDATION, NEITHER)),
    **dict.fromkeys(("test", "testing"), (TEST, NEITHER)),
    **dict.fromkeys(("query", "image_query"), (TEST, QUERY)),
    **dict.fromkeys(("gallery", "bounding_box_test", "image_test"), (TEST, GALLERY)),
}
ROLES = {"": NEITHER, "query": QUERY, "gallery": GALLERY, "query+gallery": BOTH}
TRUTH = dict.fromkeys(("", "0", "0.0", "false", "no"), 0) | dict.fromkeys(("1", "1.0", "true", "yes"), 1)
MISSING = {"nan", "none", "null", "na", "n/a", "<na>", "nat"}  # as programs write what is missing

ZEROS = re.compile(r"(-?\d+)\.0+")


def merge_labels(labels: Sequence[str], noun: str) -> tuple[list[str], list[str]]:
    """Return the class of each label, and lines on labels that are nearly the same.

    Spaces around a label, the ways to write a letter with an accent, and 3.0 beside 3 make no other class. Labels that
    differ otherwise by case, spaces or the way a number is written are classes of their own, and named.

    Args:
        labels: Different texts.
        noun: What a label is called: "label", or "class folder".
    """
    classes = [unicodedata.normalize("NFC", label).strip() for label in labels]
    known = set(classes)
    whole = {name: match[1] for name in known if (match := ZEROS.fullmatch(name)) and match[1] in known}
    classes = [whole.get(name, name) for name in classes]

    merged, alike = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for label, name in zip(labels, classes, strict=True):
        merged[name].append(label)
    for name in merged:
        alike[_folded(name)].append(name)
    lines = []
    if several := [written for written in merged.values() if len(written) > 1]:
        lines.append(
            f"{noun}s that differ only by spaces around them, the coding of an accent or a decimal zero are one class: "
            f"{_listed(several)}"
        )
    if several := [names for names in alike.values() if len(names) > 1]:
        lines.append(
            f"{noun}s that differ only by case, spaces or the way a number is written are different classes: "
            f"{_listed(several)}; if they are one class, write them alike"
        )
    if missing := [name for name in merged if name.lower() in MISSING]:
        lines.append(f"{noun} {missing[0]!r} is a class of its own; if it means that there is none, leave it empty")
    return classes, lines


def _folded(name: str) -> str:
    """Return what labels that are nearly the same have in common."""
    name = "".join(unicodedata.normalize("NFKC", name).casefold().split())
    if name[:1] in "+-.0123456789":
        try:
            return str(Decimal(name).normalize())
        except InvalidOperation:
            pass
    return name


def _listed(groups: Sequence[Sequence[str]]) -> str:
    shown = ", ".join(" and ".join(map(repr, group)) for group in groups[:3])
    return shown + (f", and {len(groups) - 3} more" if len(groups) > 3 else "")


def only_numbers(labels: Sequence[str]) -> bool:
    """Whether labels are numbers, at least one of them, apart from those that stand for what is missing."""
    others = [label for label in labels if label.lower() not in MISSING]
    try:
        return bool([float(label) for label in others])
    except ValueError:
        return False


def codes_of(texts: Sequence[str], codes: dict[str, int], name: str, source: str, first: int | None) -> np.ndarray:
    """Return the code of each text, (n,) int8, whatever its case and the spaces around it.

    Args:
        texts: What is said.
        codes: Code of each text that has one, in lower case.
        name: What they say.
        source: The key and value of the set, for errors.
        first: Row of the set's table at which the texts begin; None: it is no table.

    Raises:
        ValueError: A text has none.
    """
    known = dict[str, int]()
    for text in dict.fromkeys(texts):
        plain = text.strip().lower()
        plain = "" if plain in MISSING else plain
        if plain not in codes:
            allowed = ", ".join(code for code in codes if code and "_" not in code)
            row = "" if first is None else f" (row {first + texts.index(text) + 1})"
            raise ValueError(f"{source}: {name} {text!r} is not one of {allowed}, or empty{row}")
        known[text] = codes[plain]
    return np.fromiter(map(known.__getitem__, texts), np.int8, len(texts))
