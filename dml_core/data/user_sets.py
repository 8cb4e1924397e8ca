"""Users' own sets: a tree of class folders, or a table of paths and labels; on disk, in a bucket or on the web."""

import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.dtypes import StringDType

from dml_core.data import files
from dml_core.data.datasets import (
    BOTH,
    GALLERY,
    NEITHER,
    QUERY,
    Collection,
    LabelledImages,
    names_array,
)
from dml_core.data.labels import (
    MISSING,
    OPEN,
    ROLES,
    SPLITS,
    TEST,
    TRAIN,
    TRUTH,
    VALIDATION,
    codes_of,
    merge_labels,
    only_numbers,
)
from dml_core.data.listing import BESIDE, EXCLUDED, UNMATCHED, Sieve, list_files
from dml_core.data.packed import PackedPictures
from dml_core.data.table_rows import Rows, read_rows

GROUPS = ("label", "camera", "sequence", "split", "role")  # that a pattern may name
COLUMNS = ("path", *GROUPS, "is_query", "is_gallery")
# Columns that others call so -> what they are called here.
LIKELY = {
    **dict.fromkeys(("image", "img", "file", "filename", "file_name", "filepath", "file_path", "image_path"), "path"),
    **dict.fromkeys(("img_path", "image_id", "image_file", "image_name", "img_name", "name", "url"), "path"),
    **dict.fromkeys(("class", "class_name", "classname", "class_id", "category", "category_id", "target"), "label"),
    **dict.fromkeys(("y", "labels", "id", "pid", "person_id", "product_id", "item_id", "identity", "species"), "label"),
    **dict.fromkeys(("subset", "set", "fold", "partition", "phase", "stage", "usage", "evaluation_status"), "split"),
    **dict.fromkeys(("is_train", "is_test", "is_val", "is_validation"), "split"),
    **dict.fromkeys(("query", "gallery", "probe", "is_probe"), "role"),
    **dict.fromkeys(("cam", "cam_id", "camid", "camera_id", "cameraid"), "camera"),
    **dict.fromkeys(("seq", "seq_id", "sequence_id", "tracklet", "tracklet_id"), "sequence"),
}
ROLE_OF_FLAGS = np.array([NEITHER, QUERY, GALLERY, BOTH], np.int8)  # by is_query + 2 is_gallery
UNTIDY = re.compile(r"(?:^|/)\.?(?:/|$)")  # in paths such as ./a, a//b and a/./b


@dataclass
class _Samples:
    """Samples as a tree or a table lists them, before their labels are made classes.

    Attributes:
        names: (N,) strings.
        labels: Each different label, in the order of their first samples.
        label: (N,) places in `labels`.
        split, role: (N,) codes, see labels.py.
        camera: N names of cameras or sequences, "" where there is none; None: no sample has one.
        notes: Lines on how it was read.
    """

    names: np.ndarray
    labels: list[str]
    label: np.ndarray
    split: np.ndarray
    role: np.ndarray
    camera: list[str] | None = None
    notes: list[str] = field(default_factory=list)

    def collection(self, kept_in: files.Files, source: str, noun: str, by_value: bool, sieve: Sieve) -> Collection:
        """Return the set.

        Args:
            kept_in: Where the files are.
            source: The key and its value, for errors.
            noun: What a label is called.
            by_value: Whether classes that are numbers are in the order of their values.
            sieve: Which counted what was passed over.

        Raises:
            ValueError: A class is in two splits.
        """
        class_of, alike = merge_labels(self.labels, noun)
        names = sorted(set(class_of), key=_by_value if by_value else None)
        number = {name: place for place, name in enumerate(names)}
        labels = np.array([number[name] for name in class_of], np.int64)[self.label]
        class_split = _split_of_classes(labels, self.split, names, noun, source)
        notes = [*sieve.notes(), *self.notes, *alike]
        if (class_split == VALIDATION).any() and not (class_split == TEST).any():
            class_split[class_split == VALIDATION] = TEST
            notes.append(
                "no class is in the split test: those of validation are tested on, and classes to validate on are "
                "drawn from those of train"
            )
        role = self.role if self.role.any() else None
        if role is not None and (idle := np.count_nonzero((role == NEITHER) & (class_split[labels] >= VALIDATION))):
            notes.append(f"{idle} pictures of classes to validate or test on are neither query nor gallery: not used")
        test, validation = (np.flatnonzero(class_split == code) for code in (TEST, VALIDATION))
        return Collection(
            LabelledImages(self.names, labels, tuple(names), kept_in, cameras=_cameras(self.camera)),
            test if class_split.any() else None,
            validation if len(validation) else None,
            role,
            passed_over=dict(sieve.passed_over),
            notes=tuple(notes),
        )


def _by_value(name: str) -> tuple[int, str]:
    return (len(name), name) if name.isdigit() else (0, name)


def _cameras(names: list[str] | None) -> np.ndarray | None:
    """Return cameras as numbers in the order of their names, (N,) int64, -1 where there is none."""
    if names is None or not any(names):
        return None
    number = {name: place for place, name in enumerate(sorted({*names} - {""}))} | {"": -1}
    return np.array([number[name] for name in names], np.int64)


def _split_of_classes(
    labels: np.ndarray, split: np.ndarray, names: Sequence[str], noun: str, source: str
) -> np.ndarray:
    """Return the split of each class, (C,); labels, split: (N,). Raises ValueError for a class in two splits."""
    class_split = np.zeros(len(names), np.int8)
    class_split[labels] = split
    if (different := np.flatnonzero(class_split[labels] != split)).size:
        where = labels == labels[different[0]]
        called = {OPEN: "none", TRAIN: "train", VALIDATION: "validation", TEST: "test"}
        among = " and ".join(called[code] for code in np.unique(split[where]))
        raise ValueError(
            f"{source}: {noun} {names[labels[different[0]]]!r} is in two splits ({among}); a split must not share "
            f"classes: the model is tested on classes that it has not seen"
        )
    return class_split


def load_folder(
    root: str, links: bool = False, labelled: bool = True, exclude: Sequence[str] = (), pattern: str | None = None
) -> Collection:
    """Read a tree of pictures, in a local folder or below a URL that can be listed.

    Its folders are classes, root/CLASS/**/PICTURE, or splits with class folders in them, root/train/CLASS/PICTURE.

    Args:
        root: The folder or URL.
        links: Whether symbolic links that lead out of root are followed; they are refused otherwise.
        labelled: False: pictures in root itself are taken, too, as of a class "", and folders may be empty.
        exclude: Glob patterns of names to leave out, see listing.Sieve.
        pattern: A regular expression whose named groups (label, camera, sequence, split, role) are searched for in each
            name; None: folders alone say what a picture is.

    Returns:
        The pictures, classes and names in order.

    Raises:
        ValueError: There is no such folder, it has no classes, a class has no picture (all such are named), or a link
            leads out of root; if not labelled, the folder has no picture. Or folders look like splits and cannot be.
    """
    listing, sieve = list_files(root, links), Sieve(exclude)
    if outside := [name for name in listing.outside if not sieve.reason(name)]:
        raise ValueError(
            f"data.root={root}: {len(outside)} symbolic links lead out of it, {os.path.join(root, outside[0])} first; "
            f"data.links=true allows them"
        )
    names = [name for name in listing.files if sieve.keeps(name)]
    folders = [name for name in listing.folders if not sieve.reason(name)]
    unreadable = {name: reason for name, reason in listing.unreadable.items() if not sieve.reason(name)}
    regex = pattern_regex(pattern) if pattern and labelled else None
    groups = set(regex.groupindex) if regex else set[str]()
    tops = (
        _split_folders(names, folders, root.rstrip("/"), "label" in groups)
        if labelled and not groups & {"split", "role"}
        else ()
    )

    words = [_words_of_splits(name.split("/"), tops) for name in names]
    samples, texts = list[str](), dict[str, list[str]]({name: [] for name in GROUPS})
    for name, above in zip(names, words, strict=True):
        parts = name.split("/")[len(above) :]
        said = {
            "label": parts[0] if len(parts) > 1 else "",
            "split": above[0] if above else "",
            "role": "".join(above[1:]),
        }
        if regex:
            if (match := regex.search(name)) is None:
                sieve.passed_over[UNMATCHED] += 1
                continue
            said |= {group: text or "" for group, text in match.groupdict().items()}
        if labelled and not said["label"]:
            sieve.passed_over[UNMATCHED if "label" in groups else BESIDE] += 1
            continue
        samples.append(name)
        for group, column in texts.items():
            column.append(said.get(group, ""))

    if labelled and "label" not in groups:
        in_use = {(*above, *name.split("/")[len(above) :][:1]) for name, above in zip(names, words, strict=True)}
        excluded = [name for name in listing.files if exclude and (sieve.reason(name) or "").startswith(EXCLUDED)]
        _refuse_empty(folders, in_use, [*unreadable, *excluded], tops, root)
    inner = {name.split("/")[1] for name in samples if name.count("/") > 1}
    if labelled and len(inner) > 1 and not tops and {*texts["label"]} == {samples[0].split("/")[0]}:
        only = samples[0].split("/")[0]
        way = f"data.root={root.rstrip('/')}/{only} takes them as classes"
        raise ValueError(f"data.root={root}: its only class folder {only} has {len(inner)} folders in it; {way}")
    if not samples:
        raise ValueError(f"data.root={root}: no {_what_lacks(sieve, labelled, pattern)}")
    source = f"data.root={root}"
    result = _samples(samples, texts, source)
    if tops:
        result.notes.insert(0, f"its folders {', '.join(tops)} are taken as the split, and those in them as classes")
    collection = result.collection(files.below(root, links), source, "class folder", "label" in groups, sieve)
    return replace(collection, unreadable=unreadable)


def pattern_regex(pattern: str) -> re.Pattern[str]:
    """Compile a pattern for names. Raises ValueError where it is none, or has no group, or one of another name."""
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern={pattern}: not a regular expression ({error})") from None
    allowed = ", ".join(f"(?P<{group}>...)" for group in GROUPS)
    if not regex.groupindex:
        raise ValueError(f"pattern={pattern}: it has no named group; allowed: {allowed}")
    if unknown := [group for group in regex.groupindex if group not in GROUPS]:
        raise ValueError(f"pattern={pattern}: the group {unknown[0]} has no meaning; allowed: {allowed}")
    if {"camera", "sequence"} <= set(regex.groupindex):
        raise ValueError(f"pattern={pattern}: camera and sequence mean the same here; name one group")
    return regex


def _split_folders(names: Sequence[str], folders: Sequence[str], root: str, by_pattern: bool) -> tuple[str, ...]:
    """Return the folders in root that are splits; none where they are classes.

    Args:
        names: Of the pictures.
        folders: Names of all folders.
        root: The folder or URL.
        by_pattern: Whether a pattern, and no folder, says the class of a picture.

    Raises:
        ValueError: They look like splits, but are not only that.
    """
    tops = {*(name.split("/")[0] for name in names if "/" in name), *(name for name in folders if "/" not in name)}
    splits = sorted(top for top in tops if top.lower() in SPLITS)
    others = sorted(tops - set(splits))
    nested = {name.split("/")[0] for name in names if name.count("/") > 1}
    flat = [name for name in names if name.count("/") == 1 and name.split("/")[0] in {*splits} - nested]
    listed = ", ".join(splits)
    if not splits or (others and len(splits) == 1):
        return ()
    if flat and not by_pattern:
        if others or len(splits) == 1:
            return ()
        raise ValueError(
            f"data.root={root}: its folders {listed} look like splits, but pictures lie right in them, {flat[0]} "
            f"first; expected {splits[0]}/CLASS/PICTURE.jpg; or data.pattern, with a group (?P<label>...), finds the "
            f"class in a name"
        )
    if others:
        raise ValueError(
            f"data.root={root}: its folders {listed} look like splits, but {', '.join(others)} lies beside them; "
            f"data.exclude=[{','.join(others)}] leaves it out, data.root={root}/{splits[0]} takes one folder alone"
        )
    if len(splits) == 1 and SPLITS[splits[0].lower()][0] == TRAIN:
        way = f"data.root={root}/{splits[0]} takes it"
        raise ValueError(f"data.root={root}: its only folder {splits[0]} looks like a split; {way}")
    classes: dict[str, str] = {}
    for name in () if by_pattern else names:
        parts = name.split("/")
        above = _words_of_splits(parts, splits)
        label = parts[len(above)] if len(parts) > len(above) + 1 else None
        if label is None or not above:
            continue
        earlier = classes.setdefault(label, parts[0])
        if SPLITS[earlier.lower()][0] != SPLITS[parts[0].lower()][0]:
            one = next((top for top in splits if SPLITS[top.lower()][0] == TRAIN), earlier)
            raise ValueError(
                f"data.root={root}: its folders {listed} look like splits, but class folder {label!r} lies in "
                f"{earlier} and in {parts[0]}; a model is tested on classes that it has not seen: "
                f"data.root={root}/{one} takes that folder alone and divides its classes"
            )
    return tuple(splits)


def _words_of_splits(parts: Sequence[str], splits: Sequence[str]) -> tuple[str, ...]:
    """Return the first parts of a name that say split and role: (train,), (test, query), or none."""
    if not splits or parts[0] not in splits:
        return ()
    if len(parts) > 3 and parts[1].lower() in ("query", "gallery"):
        return parts[0], parts[1].lower()
    return (parts[0],)


def _refuse_empty(
    folders: Sequence[str], in_use: set[tuple[str, ...]], left_out: Iterable[str], splits: Sequence[str], root: str
) -> None:
    """Raise ValueError for class folders without a picture, apart from those in which something was left out."""
    depth = 2 if splits else 1
    classes = [name for name in folders if name.count("/") == depth - 1]
    hidden = {"/".join(name.split("/")[:depth]) for name in left_out}
    known = {"/".join(parts) for parts in in_use} | {"/".join(parts[:depth]) for parts in in_use}
    empty = [name for name in classes if name not in known and name not in hidden]
    if empty:
        more = f" and {len(empty) - 20} more" if len(empty) > 20 else ""
        raise ValueError(
            f"data.root={root}: class folders without a picture: {', '.join(empty[:20])}{more}; "
            f"data.exclude=[{','.join(empty[:3])}{',...' if len(empty) > 3 else ''}] leaves them out"
        )


def _what_lacks(sieve: Sieve, labelled: bool, pattern: str | None) -> str:
    """Return what a folder does not have, for an error."""
    if not labelled:
        lacking = "pictures in it"
    elif pattern:
        lacking = f"picture with a label in it; data.pattern={pattern} is searched in names relative to data.root"
    else:
        lacking = "class folders in it; expected root/CLASS/PICTURE.jpg"
    lines = sieve.notes()
    return f"{lacking} ({'; '.join(lines)})" if lines else lacking


def _samples(names: list[str], texts: dict[str, list[str]], source: str) -> _Samples:
    """Code the texts of a tree's samples."""
    numbers = dict[str, int]()
    label = np.fromiter((numbers.setdefault(text, len(numbers)) for text in texts["label"]), np.int64, len(names))
    split, role = _split_and_role(texts["split"], texts["role"], source, None)
    return _Samples(names_array(names), [*numbers], label, split, role, _one_of(texts["camera"], texts["sequence"]))


def _one_of(camera: list[str], sequence: list[str]) -> list[str] | None:
    """Return the names of cameras, or else of sequences, or None where there is neither."""
    return next((names for names in (camera, sequence) if any(names)), None)


def _split_and_role(split: list[str], role: list[str], source: str, first: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes of splits and of roles, which `split` may say, too, (n,) each. first: see codes_of."""
    splits = codes_of(split, {word: code for word, (code, _) in SPLITS.items()}, "split", source, first)
    said = codes_of(split, {word: code for word, (_, code) in SPLITS.items()}, "split", source, first)
    roles = codes_of(role, ROLES, "role", source, first)
    return splits, np.where(roles == NEITHER, said, roles).astype(np.int8)


def load_table(
    table: str,
    root: str | None,
    links: bool = False,
    labelled: bool = True,
    exclude: Sequence[str] = (),
    cache: Path | None = None,
) -> Collection:
    """Read a CSV or Parquet file with the columns path and label, and perhaps split, role, and camera or sequence.

    path is relative to root, or below it, or a URL below it, or a struct with the picture's bytes; split is train,
    validation (val), test or empty, the same for all rows of a label; role is query, gallery or empty. In place of role
    there may be is_query and is_gallery, which may both be true.

    Args:
        table: The file, local or a URL.
        root: The folder or URL that paths are relative to; None: the table's folder, or the host of the first URL.
        links: Whether symbolic links that lead out of root are followed.
        labelled: False: rows without a label are of a class "", and split and role are ignored.
        exclude: Glob patterns of names to leave out, see listing.Sieve.
        cache: A folder to unpack pictures in that lie in the table; None: that for temporary files.

    Returns:
        The pictures, classes in the order of their names, numbers by value.

    Raises:
        ValueError: A column or value is missing, a split or role is unknown, a path leads out of the root or comes
            twice, or a label is in two splits. The message names the first row at fault.
    """
    source, sieve = f"data.table={table}", Sieve(exclude)
    rows = read_rows(table, COLUMNS if labelled else ("path", "label"))
    plain = [column.strip().lower() for column in rows.columns]
    _require_columns(rows, plain, labelled, table)
    given_root, first, parts = root, 0, list[tuple[np.ndarray, ...]]()
    numbers, cameras = dict[str, int](), list[str]()
    for chunk in rows.chunks:
        paths, count = chunk["path"], len(chunk["path"])
        _require_values(paths, "path", first, table)
        if root is None and count:
            root = "/".join(paths[0].split("/")[:3]) if "://" in paths[0] else table.rpartition("/")[0] or "."
        if rows.pictures is None:
            paths = _tidy_paths(paths, root or ".", given_root, table, first)
        texts = {name: chunk.get(name, [""] * count) for name in GROUPS}
        if labelled:
            _require_labels(texts["label"], first, table)
        kept = np.fromiter(map(sieve.keeps_row, paths), bool, count)
        split, role = _split_and_role(texts["split"], texts["role"], source, first)
        is_query, is_gallery = (
            codes_of(chunk.get(name, [""] * count), TRUTH, name, source, first) for name in ("is_query", "is_gallery")
        )
        role = np.where(role == NEITHER, ROLE_OF_FLAGS[is_query + 2 * is_gallery], role)
        label = np.fromiter((numbers.setdefault(text, len(numbers)) for text in texts["label"]), np.int64, count)
        camera = _one_of(texts["camera"], texts["sequence"]) or [""] * count
        cameras += [name.strip() for name, keep in zip(camera, kept.tolist(), strict=True) if keep]
        hashes = np.fromiter(map(hash, paths), np.int64, count)
        row = np.arange(first + 1, first + count + 1)
        parts.append(tuple(part[kept] for part in (np.array(paths, StringDType()), hashes, row, label, split, role)))
        first += count
    if not first:
        raise ValueError(f"data.table={table}: it has no rows")
    names, hashes, row, label, split, role = (np.concatenate(part) for part in zip(*parts, strict=True))
    if not len(names):
        raise ValueError(f"data.table={table}: no row is left ({'; '.join(sieve.notes())})")
    if rows.pictures is None:
        _refuse_duplicates(names, hashes, row, table)
    used, label = np.unique(label, return_inverse=True)  # data.exclude may have left nothing of others
    labels = np.array([*numbers], object)[used].tolist()
    notes = list[str]()
    if labelled:
        _refuse_missing_numbers(labels, label, row, table)
        notes = _notes_on_columns(rows, plain)
    assert root is not None
    samples = _Samples(names, labels, label, split, role, cameras, notes)
    kept_in = files.below(root, links)
    if rows.pictures is not None:
        kept_in = PackedPictures(table, rows.pictures, cache or Path(tempfile.gettempdir()) / "dml-tables", kept_in)
    return samples.collection(kept_in, source, "label", True, sieve)


def _require_columns(rows: Rows, plain: Sequence[str], labelled: bool, table: str) -> None:
    """Raise ValueError where a column is missing that is needed, with that which may be meant."""
    for name in ("path", "label") if labelled else ("path",):
        if name in plain or (name == "path" and rows.pictures):
            continue
        alike = [column for column, text in zip(rows.columns, plain, strict=True) if LIKELY.get(text) == name]
        hint = f"; if {alike[0]} is meant, rename it to {name}" if alike else ""
        if not {*plain} & {*COLUMNS, *LIKELY} and len(rows.columns) > 1:
            hint += "; the first line must name the columns, path,label"
        if len(rows.columns) == 1:
            hint += "; is the separator something else than a comma, semicolon, tab or bar?"
        raise ValueError(f"data.table={table}: no column {name}; there are {', '.join(rows.columns)}{hint}")
    if {"camera", "sequence"} <= set(plain):
        raise ValueError(
            f"data.table={table}: the columns camera and sequence mean the same here; rename the one not to be used"
        )
    flags = {"is_query", "is_gallery"} & set(plain)
    if labelled and flags and "role" in plain:
        raise ValueError(
            f"data.table={table}: the columns role and {min(flags)} say the same; rename the one not to be used"
        )


def _require_values(texts: Sequence[str], name: str, first: int, table: str) -> None:
    """Raise ValueError for an empty text, with its row."""
    if "" in texts:
        raise ValueError(f"data.table={table}: row {first + texts.index('') + 1} has no {name}")


def _require_labels(labels: Sequence[str], first: int, table: str) -> None:
    """Raise ValueError for a label that is empty or of several lines, with its row."""
    labels = [label.strip() for label in labels]
    _require_values(labels, "label", first, table)
    broken = next((place for place, label in enumerate(labels) if "\n" in label), None)
    if broken is not None:
        row, shown = first + broken + 1, labels[broken][:80]
        raise ValueError(
            f"data.table={table}: the label in row {row} has a line break: {shown!r}; is a quote not closed?"
        )


def _refuse_missing_numbers(labels: Sequence[str], label: np.ndarray, rows: np.ndarray, table: str) -> None:
    """Raise ValueError for a label such as nan where all others are numbers. label: places in `labels`, (N,)."""
    if only_numbers(labels):
        missing = np.isin(label, [place for place, text in enumerate(labels) if text.strip().lower() in MISSING])
        if missing.any():
            first = missing.argmax()
            raise ValueError(f"data.table={table}: row {rows[first]} has no label ({labels[label[first]].strip()})")


def _notes_on_columns(rows: Rows, plain: Sequence[str]) -> list[str]:
    """Return a line on columns that are not used although they seem to say something that is."""
    idle = []
    for column, text in zip(rows.columns, plain, strict=True):
        meant = LIKELY.get(text)
        if meant is None or column == rows.pictures:
            continue
        there = meant in plain or (meant == "role" and "is_query" in plain) or (meant == "path" and rows.pictures)
        if not there:
            idle.append(f"{column} (if it says the {meant}, rename it to {meant})")
        elif meant in ("split", "role", "label"):
            idle.append(f"{column} ({meant} is)")
    return [f"columns that are not used: {', '.join(idle)}"] if idle else []


def _tidy_paths(paths: list[str], root: str, given_root: str | None, table: str, first: int) -> list[str]:
    """Return paths relative to the root, one path for one file.

    Args:
        paths: As the table has them.
        root: The folder or URL.
        given_root: The same where the user gave it, or None.
        table: For errors.
        first: Rows before these.

    Raises:
        ValueError: A path has backslashes or a line break, or leads out of the root.
    """
    starts = [f"{root.rstrip('/')}/"]
    if "://" not in root:
        starts += [f"{place}/" for place in (os.path.abspath(root), os.path.realpath(root))]
    for number, path in enumerate(paths):
        if "\\" in path or "\n" in path:
            fault = "backslashes; write / between folders" if "\\" in path else "a line break; is a quote not closed?"
            raise ValueError(f"data.table={table}: the path in row {first + number + 1} has {fault}: {path[:200]!r}")
        if path[0] == "/" or "://" in path:
            path = next((path.removeprefix(start) for start in starts if path.startswith(start)), path)
        if UNTIDY.search(path) and "://" not in path:
            whole = [part for part in path.split("/") if part not in ("", ".")]
            path = ("/" if path[0] == "/" else "") + "/".join(whole)
        paths[number] = path
    absolute = [path for path in paths if path[:1] == "/"]
    if absolute:
        holding = os.path.commonpath([os.path.dirname(path) for path in absolute])
        raise ValueError(
            f"data.table={table}: {len(absolute)} paths lead out of the root, {absolute[0]!r} first; the root is "
            f"{given_root or f'the folder of the table, {root}'}: data.root={holding} has them all"
        )
    files.check_names(np.array(paths, StringDType()), f"data.table={table}")
    return paths


def _refuse_duplicates(names: np.ndarray, hashes: np.ndarray, rows: np.ndarray, table: str) -> None:
    """Raise ValueError for a name that comes more than once. names: (N,) strings; hashes: theirs; rows: their rows."""
    ordered = np.sort(hashes)
    if not (repeated := ordered[1:] == ordered[:-1]).any():
        return
    suspects = np.flatnonzero(np.isin(hashes, ordered[1:][repeated]))
    earlier, twice = dict[str, int](), Counter[str]()
    for name, row in zip(names[suspects].tolist(), rows[suspects].tolist(), strict=True):
        if name in earlier:
            twice[name] += 1
            if len(twice) == 1 and twice[name] == 1:
                both = earlier[name], row
        earlier.setdefault(name, row)
    if twice:
        more = f"; {len(twice) - 1} other paths, too" if len(twice) > 1 else ""
        raise ValueError(
            f"data.table={table}: the path {next(iter(twice))!r} comes more than once, in rows {both[0]} and "
            f"{both[1]}{more}"
        )
