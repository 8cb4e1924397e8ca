"""Users' own sets: a class-per-folder tree, or a table of paths and labels; on disk, in a bucket or on the web."""

import logging
import os
from collections.abc import Iterator
from csv import reader as csv_rows
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from numpy.dtypes import StringDType

from dml_core.data import files
from dml_core.data.datasets import CHUNK, GALLERY, NEITHER, QUERY, Collection, LabelledImages, names_array

if TYPE_CHECKING:
    import pyarrow as pa

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
SPLITS = {"": 0, "train": 1, "validation": 2, "val": 2, "test": 3}
ROLES = {"": NEITHER, "query": QUERY, "gallery": GALLERY}


def load_folder(root: str, links: bool = False, labelled: bool = True) -> Collection:
    """Read a class-per-folder tree, root/CLASS/**/PICTURE, in a local folder or below a URL that can be listed.

    Args:
        root: The folder or URL.
        links: Whether symbolic links that lead out of root are followed; they are refused otherwise.
        labelled: False: pictures in root itself are taken, too, as of a class "", and folders may be empty.

    Returns:
        The pictures, classes and names in order.

    Raises:
        ValueError: There is no such folder, it has no classes, a class has no picture (all such are named), or a link
            leads out of root; if not labelled, the folder has no picture.
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
        folders = {name: pictures for name, pictures in folders.items() if pictures}
    if not folders:
        lacking = "class folders in it; expected root/CLASS/PICTURE.jpg" if labelled else "pictures in it"
        raise ValueError(f"data.root={root}: no {lacking}")
    if empty := [name for name, pictures in folders.items() if not pictures]:
        raise ValueError(f"data.root={root}: class folders without a picture: {', '.join(empty)}")
    labels = np.repeat(np.arange(len(folders)), [len(pictures) for pictures in folders.values()])
    names = names_array([name for pictures in folders.values() for name in pictures])
    return Collection(LabelledImages(names, labels, tuple(folders), files.below(root, links)))


def _local_tree(root: str, links: bool) -> dict[str, list[str]]:
    """Return class -> names of its pictures, both in order; "" -> those in root itself."""
    real, outside = os.path.realpath(root) + os.sep, list[str]()

    def entries(folder: str, above: tuple[str, ...]) -> Iterator[tuple[os.DirEntry[str], tuple[str, ...]]]:
        """Yield the entries of a folder, but no link that leads out of the root or back to a folder above."""
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
        elif os.path.splitext(entry.name)[1].lower() in PICTURE_SUFFIXES and entry.is_file():
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
    """Return class -> names of its pictures, as `_local_tree`, of a URL."""
    system, root = remote.system()
    try:
        paths = sorted(system.find(root))
    except Exception as error:  # each file system has exceptions of its own
        logging.getLogger(__name__).info("%s cannot be listed", remote.root, exc_info=True)
        raise ValueError(f"data.root={remote.root}: cannot be listed ({type(error).__name__}: {error})") from None
    tree: dict[str, list[str]] = {}
    for path in paths:
        name = path.removeprefix(root).lstrip("/")
        if PurePosixPath(name).suffix.lower() in PICTURE_SUFFIXES:
            tree.setdefault(name.rpartition("/")[0].split("/")[0], []).append(name)
    return tree


def load_table(table: str, root: str | None, links: bool = False, labelled: bool = True) -> Collection:
    """Read a CSV or Parquet file with the columns path and label, and perhaps split and role.

    path is relative to root, or a URL below it; split is train, validation (val), test or empty, the same for all rows
    of a label; role is query, gallery or empty.

    Args:
        table: The file, local or a URL.
        root: The folder or URL that paths are relative to; None: the table's folder, or the host of the first URL.
        links: Whether symbolic links that lead out of root are followed.
        labelled: False: rows without a label are of a class "", and split and role are ignored.

    Returns:
        The pictures, classes in the order of their names, numbers by value.

    Raises:
        ValueError: A column or value is missing, a split or role is unknown, a path leads out of the root or comes
            twice, or a label is in two splits. The message names the first row at fault.
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
    class_split = _split_of_classes(label, split, order, table)
    assert root is not None
    images = LabelledImages(names, label, tuple(order), files.below(root, links))
    test, validation = (np.flatnonzero(class_split == SPLITS[name]) for name in ("test", "validation"))
    return Collection(
        images,
        test if class_split.any() else None,
        validation if len(validation) else None,
        role if role.any() else None,
    )


def _batches(table: str, *columns: str) -> "Iterator[pa.RecordBatch]":
    """Yield the record batches of a file, with those of these columns that it has."""
    import fsspec
    import pyarrow as pa
    from pyarrow import csv, parquet

    suffix = PurePosixPath(table).suffix.lower()
    if suffix not in (".csv", ".parquet"):
        raise ValueError(f"data.table={table}: not a .csv or .parquet file")
    try:
        with fsspec.open(table, "rb") as file:
            if suffix == ".parquet":
                parquet_file = parquet.ParquetFile(file)
                names = parquet_file.schema_arrow.names
                yield from parquet_file.iter_batches(CHUNK, columns=[c for c in columns if c in names] or names)
                return
            line = file.readline().decode("utf-8-sig")
        names = next(csv_rows([line]), [])
        types = {name: pa.string() for name in names}  # else guessed from the first rows, and wrong for later ones
        convert = csv.ConvertOptions(column_types=types, include_columns=[c for c in columns if c in names] or names)
        with fsspec.open(table, "rb") as file:
            yield from csv.open_csv(file, csv.ReadOptions(block_size=2**23), convert_options=convert)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"data.table={table}: cannot be read ({str(error).splitlines()[0]})") from None


def _text(batch: "pa.RecordBatch", name: str, table: str, first: int, labelled: bool = True) -> "pa.StringArray":
    """Return a column as strings, empty ones where an optional column is missing.

    Args:
        batch: The record batch.
        name: The column.
        table: The file, for errors.
        first: Row of the file at which the batch begins.
        labelled: Whether the column label is required.

    Raises:
        ValueError: A required column or value is missing.
    """
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


def _codes(column: "pa.StringArray", codes: dict[str, int], name: str, table: str) -> np.ndarray:
    """Return the code of each value of a column, (n,) int8. Raises ValueError for a value without a code."""
    coded = column.dictionary_encode()
    values = coded.dictionary.to_pylist()
    if unknown := [value for value in values if value not in codes]:
        allowed = ", ".join(code for code in codes if code)
        raise ValueError(f"data.table={table}: {name} {unknown[0]!r} is not one of {allowed}, or empty")
    return np.array([codes[value] for value in values], np.int8)[coded.indices.to_numpy(zero_copy_only=False)]


def _refuse_duplicates(names: np.ndarray, hashes: np.ndarray, table: str) -> None:
    """Raise ValueError for a name that comes more than once. names: (N,) strings; hashes: (N,) theirs."""
    ordered = np.sort(hashes)
    if not (repeated := ordered[1:] == ordered[:-1]).any():
        return
    suspects = names[np.isin(hashes, ordered[1:][repeated])].tolist()
    earlier = set[str]()
    for name in suspects:
        if name in earlier:
            raise ValueError(f"data.table={table}: the path {name!r} comes more than once")
        earlier.add(name)


def _split_of_classes(labels: np.ndarray, split: np.ndarray, names: np.ndarray, table: str) -> np.ndarray:
    """Return the split of each class, (C,); labels, split: (N,). Raises ValueError for a class in two splits."""
    class_split = np.zeros(len(names), np.int8)
    class_split[labels] = split
    if (different := np.flatnonzero(class_split[labels] != split)).size:
        name = names[labels[different[0]]]
        raise ValueError(f"data.table={table}: label {name!r} is in two splits; a split must not share classes")
    return class_split
