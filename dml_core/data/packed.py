"""Pictures that lie in a column of a Parquet table: unpacked once to a file on this machine, and read from there."""

import hashlib
import os
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

import numpy as np
from numpy.dtypes import StringDType

from dml_core.data.files import Files, below, check_names
from dml_core.data.table_rows import errors_of

AT_ONCE = 64  # pictures in memory, whatever the size of a row group
NUMBER = np.dtype("<i8")


class Unpacked(NamedTuple):
    """An unpacked column of N pictures: their bytes, where each begins and the last ends (N + 1,), hashes (N,)."""

    content: "np.memmap[Any, Any]"
    starts: np.ndarray
    hashes: np.ndarray


class PackedPictures:
    """The pictures of a table's column, by the names that `table_rows` gives them: ROW:PATH.

    A row without bytes is a file of its path.

    Args:
        table: The Parquet file, local or a URL.
        column: Of structs with `bytes` and perhaps `path`.
        cache: The folder in which the pictures are unpacked, which takes as much room as they do.
        others: Where files of rows without bytes are read from.
    """

    def __init__(self, table: str, column: str, cache: Path, others: Files):
        self.root, self.column, self.cache, self.others = table, column, cache, others
        self._opened: Unpacked | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def read(self, name: str) -> bytes:
        row, _, path = name.partition(":")
        unpacked = self._open()
        start, end = unpacked.starts[int(row) - 1 : int(row) + 1]
        if start < end:
            return unpacked.content[start:end].tobytes()
        check_names(np.array([path], StringDType()), f"row {row}")
        return self.others.read(path)

    def stamps(self, names: np.ndarray) -> np.ndarray:
        unpacked = self._open()
        parts = [name.partition(":") for name in names]
        rows = np.array([int(row) - 1 for row, _, _ in parts], np.int64)
        stamps = np.array([f"{content:x}" for content in unpacked.hashes[rows].tolist()], StringDType())
        paths = np.array([path for _, _, path in parts], StringDType())
        files = np.flatnonzero((unpacked.starts[rows] == unpacked.starts[rows + 1]) & (paths != ""))
        stamps[files] = self.others.stamps(paths[files])
        return stamps

    def _open(self) -> Unpacked:
        if self._opened is None:
            with errors_of(self.root):
                key = hashlib.sha256(f"{self.root}|{self.column}|{_version(self.root)}".encode()).hexdigest()[:24]
                path = self.cache / f"{key}.pictures"
                if not path.is_file():
                    _unpack(self.root, self.column, path)
            content = np.memmap(path, np.uint8, "r")
            count = int(content[-NUMBER.itemsize :].view(NUMBER)[0])
            numbers = content[-(2 * count + 2) * NUMBER.itemsize :].view(NUMBER)
            self._opened = Unpacked(content, numbers[: count + 1], numbers[count + 1 : -1])
        return self._opened


def _version(table: str) -> str:
    """Return a text that changes when a file does."""
    import fsspec

    folder, _, name = table.rpartition("/")
    if stamp := below(folder or ("/" if table.startswith("/") else ".")).stamps(np.array([name], StringDType()))[0]:
        return str(stamp)
    with fsspec.open(table, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unpack(table: str, column: str, path: Path) -> None:
    """Write the bytes of all pictures, where each begins and the last ends, hashes of their bytes, and their number."""
    import fsspec
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    starts, hashes = [0], list[int]()
    with NamedTemporaryFile(dir=path.parent, delete=False) as target:
        try:
            with fsspec.open(table, "rb") as file:
                for batch in parquet.ParquetFile(file, buffer_size=2**20).iter_batches(
                    AT_ONCE, columns=[f"{column}.bytes"]
                ):
                    for entry in batch.column(column).to_pylist():
                        content = (entry or {}).get("bytes") or b""
                        target.write(content)
                        starts.append(starts[-1] + len(content))
                        hashes.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1)
            target.write(b"\0" * (-starts[-1] % NUMBER.itemsize))
            target.write(np.array([*starts, *hashes, len(hashes)], NUMBER).tobytes())
        except BaseException:
            os.unlink(target.name)
            raise
    os.replace(target.name, path)  # whoever else unpacks it now writes the same
