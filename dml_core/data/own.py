"""Sets that people have: a class-per-folder tree, or a table of paths and labels; on disk, in a bucket, on the web."""

import os
from collections.abc import Iterator
from csv import reader as csv_rows
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.dtypes import StringDType

from dml_core.data import files
from dml_core.data.datasets import CHUNK, GALLERY, NEITHER, QUERY, Collection, LabelledImages, names_array

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
SPLITS = {"": 0, "train": 1, "validation": 2, "val": 2, "test": 3}
ROLES = {"": NEITHER, "query": QUERY, "gallery": GALLERY}


def load_folder(root: str, links: bool = False, labelled: bool = True) -> Collection:
    """A class-per-folder tree, root/CLASS/**/PICTURE, in a local folder or below a URL that can be listed.

    links: follow symbolic links that lead out of root, which are refused otherwise.  labelled: False takes pictures in
    root itself, too, as of a class "".
    ValueError for a missing folder, one without classes, classes without a picture and links out (all are named); if
    not labelled, for one without a picture.
    """
    if "://" in root:
        folders = _remote_tree(files.RemoteFiles(root))
    else:
        if not os.path.isdir(root):
            raise ValueError(f"data.root={root}: no such folder")
        folders = _local_tree(root, links)
    if labelled:
        folders.pop("", None)
    else:
        folders = {name: found for name, found in folders.items() if found}
    if not folders:
        wanted = "class folders in it; expected root/CLASS/PICTURE.jpg" if labelled else "pictures in it"
        raise ValueError(f"data.root={root}: no {wanted}")
    if empty := [name for name, found in folders.items() if not found]:
        raise ValueError(f"data.root={root}: class folders without a picture: {', '.join(empty)}")
    labels = np.repeat(np.arange(len(folders)), [len(found) for found in folders.values()])
    names = names_array([name for found in folders.values() for name in found])
    return Collection(LabelledImages(names, labels, tuple(folders), files.below(root, links)))


def _local_tree(root: str, links: bool) -> dict[str, list[str]]:
    """Class -> names of its pictures, both in order; "" -> those in root itself."""
    real, outside = os.path.realpath(root) + os.sep, list[str]()

    def entries(folder: str, above: tuple[str, ...]) -> Iterator[tuple[os.DirEntry[str], tuple[str, ...]]]:
        """What a link out of the root, or back to a folder above, does not hide."""
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            if entry.name.startswith("."):
                continue
            target = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
            if entry.is_symlink() and not links and not (target + os.sep).startswith(real):
                outside.append(entry.path)
            elif target not in above:
                yield entry, (*above, target)

    def pictures(entry: os.DirEntry[str], above: tuple[str, ...]) -> Iterator[str]:
        if entry.is_dir():
            for inner, path in entries(entry.path, above):
                yield from pictures(inner, path)
        elif os.path.splitext(entry.name)[1].lower() in PICTURES and entry.is_file():
            yield os.path.relpath(entry.path, root)

    tree = dict[str, list[str]]()
    for entry, path in entries(root, (os.path.realpath(root),)):
        tree.setdefault(entry.name if entry.is_dir() else "", []).extend(pictures(entry, path))
    if outside:
        raise ValueError(
            f"data.root={root}: {len(outside)} symbolic links lead out of it, {outside[0]} first; "
            f"data.links=true allows them"
        )
    return tree


def _remote_tree(remote: files.RemoteFiles) -> dict[str, list[str]]:
    system, root = remote.system()
    try:
        paths = sorted(system.find(root))
    except Exception as error:  # each system has exceptions of its own
        raise ValueError(f"data.root={remote.root}: cannot be listed ({type(error).__name__}: {error})") from None
    tree: dict[str, list[str]] = {}
    for path in paths:
        name = path.removeprefix(root).lstrip("/")
        if PurePosixPath(name).suffix.lower() in PICTURES:
            tree.setdefault(name.rpartition("/")[0].split("/")[0], []).append(name)
    return tree


def load_table(table: str, root: str | None, links: bool = False, labelled: bool = True) -> Collection:
    """A CSV or Parquet file with the columns path and label, and perhaps split and role; local or a URL.

    path: below root (by default the table's folder), or a URL below it.  split: train, validation (val), test or
    empty, the same for all rows of a label.  role: query, gallery or empty.
    labelled: False takes rows without a label as of a class "", and looks at path and label alone.
    ValueError names the first row at fault: a missing column or value, an unknown split or role, a path that leads out
    of the root, a path that comes twice, a label in two splits.
    """
    numbers = dict[str, int]()
    labels, splits, roles = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    for batch in _batches(table, *(("label", "split", "role") if labelled else ("path", "label"))):
        first = sum(map(len, labels))
        columns = {name: _text(batch, name, table, first, labelled) for name in ("label", "split", "role")}
        coded = columns["label"].dictionary_encode()
        ids = [numbers.setdefault(name, len(numbers)) for name in coded.dictionary.to_pylist()]
        labels.append(np.array(ids, np.int64)[coded.indices.to_numpy(zero_copy_only=False)])
        splits.append(_codes(columns["split"], SPLITS, "split", table))
        roles.append(_codes(columns["role"], ROLES, "role", table))
    if not sum(map(len, labels)):
        raise ValueError(f"data.table={table}: it has no rows")
    label, split, role = (np.concatenate(parts) for parts in (labels, splits, roles))

    # Read a second time, so that paths are in memory once.
    names, hashes, start = np.empty(len(label), StringDType()), np.empty(len(label), np.int64), 0
    for batch in _batches(table, "path"):
        paths = _text(batch, "path", table, start).to_pylist()
        if root is None:
            root = "/".join(paths[0].split("/")[:3]) if "://" in paths[0] else table.rpartition("/")[0] or "."
        paths = [path.removeprefix(f"{root}/") for path in paths]
        end = start + len(paths)
        names[start:end], hashes[start:end] = paths, np.fromiter(map(hash, paths), np.int64, len(paths))
        files.check_names(names[start:end], f"data.table={table}")
        start = end
    _refuse_duplicates(names, hashes, table)

    order = np.array(sorted(numbers, key=lambda name: (len(name), name) if name.isdigit() else (0, name)), dtype=object)
    rank = np.empty(len(order), np.int64)
    rank[[numbers[name] for name in order]] = np.arange(len(order))
    label = rank[label]
    part = _split_of_classes(label, split, order, table)
    assert root is not None
    images = LabelledImages(names, label, tuple(order), files.below(root, links))
    test, validation = np.flatnonzero(part == SPLITS["test"]), np.flatnonzero(part == SPLITS["validation"])
    return Collection(
        images, test if part.any() else None, validation if len(validation) else None, role if role.any() else None
    )


def _batches(table: str, *columns: str) -> Iterator[Any]:
    """pyarrow record batches of a file, with these columns where it has them."""
    import fsspec
    import pyarrow as pa
    from pyarrow import csv, parquet

    suffix = PurePosixPath(table).suffix.lower()
    if suffix not in (".csv", ".parquet"):
        raise ValueError(f"data.table={table}: not a .csv or .parquet file")
    try:
        with fsspec.open(table, "rb") as file:
            if suffix == ".parquet":
                opened = parquet.ParquetFile(file)
                there = opened.schema_arrow.names
                yield from opened.iter_batches(CHUNK, columns=[c for c in columns if c in there] or there)
                return
            line = file.readline().decode("utf-8-sig")
        there = next(csv_rows([line]), [])
        types = {name: pa.string() for name in there}  # else guessed from the first rows, and wrong for later ones
        wanted = csv.ConvertOptions(column_types=types, include_columns=[c for c in columns if c in there] or there)
        with fsspec.open(table, "rb") as file:
            yield from csv.open_csv(file, csv.ReadOptions(block_size=2**23), convert_options=wanted)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"data.table={table}: cannot be read ({str(error).splitlines()[0]})") from None


def _text(batch: Any, name: str, table: str, first: int, labelled: bool = True) -> Any:
    """A column as strings; empty ones where there is no such column and it may be missing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    required = name == "path" or (labelled and name == "label")
    if name not in batch.schema.names:
        if required:
            raise ValueError(f"data.table={table}: no column {name}; there are {', '.join(batch.schema.names)}")
        return pa.array([""] * len(batch), pa.string())
    column = batch.column(name).cast(pa.string())
    column = pc.fill_null(column, "")
    if required and (empty := pc.index(column, "").as_py()) >= 0:
        raise ValueError(f"data.table={table}: row {first + empty + 1} has no {name}")
    return column


def _codes(column: Any, codes: dict[str, int], name: str, table: str) -> np.ndarray:
    coded = column.dictionary_encode()
    values = coded.dictionary.to_pylist()
    if unknown := [value for value in values if value not in codes]:
        allowed = ", ".join(code for code in codes if code)
        raise ValueError(f"data.table={table}: {name} {unknown[0]!r} is not one of {allowed}, or empty")
    return np.array([codes[value] for value in values], np.int8)[coded.indices.to_numpy(zero_copy_only=False)]


def _refuse_duplicates(names: np.ndarray, hashes: np.ndarray, table: str) -> None:
    ordered = np.sort(hashes)
    if not (twice := ordered[1:] == ordered[:-1]).any():
        return
    suspects = names[np.isin(hashes, ordered[1:][twice])].tolist()
    seen = set[str]()
    for name in suspects:
        if name in seen:
            raise ValueError(f"data.table={table}: the path {name!r} comes more than once")
        seen.add(name)


def _split_of_classes(labels: np.ndarray, split: np.ndarray, names: np.ndarray, table: str) -> np.ndarray:
    """(C,) the split of each class."""
    part = np.zeros(len(names), np.int8)
    part[labels] = split
    if (different := np.flatnonzero(part[labels] != split)).size:
        name = names[labels[different[0]]]
        raise ValueError(f"data.table={table}: label {name!r} is in two splits; a split must not share classes")
    return part
