"""A Parquet file that several workers write: each the row groups of its own blocks, in a part beside the file.

The driver then copies row group after row group into the file, in the order of the set: nobody ever holds more than a
block, and the file does not tell how many workers there were. Labels alone have a dictionary: they repeat.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.fs
from pyarrow import parquet

from dml_core.retrieval.neighbors import block_rows


class OutputFile(NamedTuple):
    """A file to be written: its address, absolute or a URL, its file system, and its path there."""

    address: str
    files: pyarrow.fs.FileSystem
    path: str


def prepare_output(out: str) -> OutputFile:
    """Find where a new file goes, and make the folder of its parts. ValueError where no new file can be."""
    if not out.endswith(".parquet"):
        hint = "; pandas reads it by read_parquet, and writes CSV by to_csv" if out.lower().endswith(".csv") else ""
        raise ValueError(f"--out {out}: not a name that ends with .parquet{hint}")
    address = out if "://" in out else str(Path(out).expanduser().resolve())
    try:
        files, path = pyarrow.fs.FileSystem.from_uri(address)
        if files.get_file_info(path).type != pyarrow.fs.FileType.NotFound:
            raise ValueError("it exists already; remove it or choose another name")
        files.create_dir(f"{path}.parts", recursive=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"--out {address}: cannot be written to ({str(error).splitlines()[0]})") from None
    return OutputFile(address, files, path)


@contextmanager
def open_part(out: str, number: int, columns: pa.Schema) -> Iterator[parquet.ParquetWriter]:
    """Open a worker's part of a file for its row groups.

    Args:
        out: The address of the file.
        number: Of the worker, from 0.
        columns: Of the file.
    """
    files, path = pyarrow.fs.FileSystem.from_uri(out)
    with (
        files.open_output_stream(_part_path(path, number)) as sink,
        parquet.ParquetWriter(sink, columns, use_dictionary=["label"]) as part,
    ):
        yield part


def join_parts(output: OutputFile, columns: pa.Schema, rows: int, workers: int) -> None:
    """Copy the parts into the file: block b is the row group b // workers of part b % workers."""
    files, path = output.files, output.path
    with (
        files.open_output_stream(f"{path}.parts/whole") as sink,
        parquet.ParquetWriter(sink, columns, use_dictionary=["label"]) as whole,
    ):
        parts = [parquet.ParquetFile(files.open_input_file(_part_path(path, number))) for number in range(workers)]
        for block in range(-(-rows // block_rows(rows))):
            whole.write_table(parts[block % workers].read_row_group(block // workers))
    files.move(f"{path}.parts/whole", path)


def remove_parts(output: OutputFile) -> None:
    """Remove the folder of the parts."""
    output.files.delete_dir(f"{output.path}.parts")


def _part_path(path: str, number: int) -> str:
    return f"{path}.parts/{number:05d}.parquet"
