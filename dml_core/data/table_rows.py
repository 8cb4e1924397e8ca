"""The rows of a CSV or Parquet file as texts, whatever wrote it; what cannot be read is named with its row."""

import codecs
import contextlib
import csv
import io
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from dml_core.data.datasets import CHUNK

if TYPE_CHECKING:
    import pyarrow as pa

Chunk = dict[str, list[str]]  # column -> texts of some rows, "" where there is none

HEAD = 2**16  # bytes from which encoding and separator are told
SEPARATORS = (",", ";", "\t", "|")
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
OTHER_FILES = {b"PK\x03\x04": "an Excel workbook or a zip archive", b"\x1f\x8b": "compressed by gzip"}
OTHER_FILES |= {b"PAR1": "a Parquet file, whose name ends with .parquet", b"\xd0\xcf\x11\xe0": "an old Excel workbook"}


class Rows(NamedTuple):
    """The rows of a table.

    Attributes:
        columns: The names of all its columns.
        pictures: The column that holds the pictures themselves, if any; its texts are names for them, each begins with
            the number of its row and a colon.
        chunks: The texts of the wanted columns that there are, some rows at a time.
    """

    columns: tuple[str, ...]
    pictures: str | None
    chunks: Iterator[Chunk]


def read_rows(table: str, wanted: Sequence[str]) -> Rows:
    """Read columns of a CSV or Parquet file.

    Args:
        table: The file, local or a URL.
        wanted: Names of columns, in lower case. Those of the file are compared without case and surrounding spaces.

    Raises:
        ValueError: The file, or a row of it, cannot be read, or two columns have one name. The message begins with
            data.table and the file.
    """
    suffix = PurePosixPath(table).suffix.lower()
    if suffix not in (".csv", ".parquet"):
        raise ValueError(f"data.table={table}: not a .csv or .parquet file")
    return (_csv_rows if suffix == ".csv" else _parquet_rows)(table, wanted)


@contextlib.contextmanager
def errors_of(table: str) -> Iterator[None]:
    """Turn what a file system or a reader raises into a ValueError that names the table, with its traceback logged."""
    try:
        yield
    except Exception as error:  # each file system has exceptions of its own
        if isinstance(error, ValueError) and str(error).startswith("data.table="):
            raise
        logging.getLogger(__name__).info("%s cannot be read", table, exc_info=True)
        reason = getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"data.table={table}: cannot be read ({reason})") from None


def _places(columns: Sequence[str], wanted: Sequence[str], table: str) -> dict[str, int]:
    """Return the place of each wanted column that there is."""
    plain = [column.strip().lower() for column in columns]
    if twice := [name for name in wanted if plain.count(name) > 1]:
        raise ValueError(f"data.table={table}: several columns are called {twice[0]}; rename all but one")
    return {name: plain.index(name) for name in wanted if name in plain}


def _csv_rows(table: str, wanted: Sequence[str]) -> Rows:
    """Read a CSV file: UTF-8, or UTF-16 with a byte order mark; any separator and line end."""
    import fsspec

    with errors_of(table), fsspec.open(table, "rb") as file:
        head = file.read(HEAD)
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), "utf-8")
    if kind := next((kind for magic, kind in OTHER_FILES.items() if head.startswith(magic)), None):
        raise ValueError(f"data.table={table}: not a CSV file: it seems to be {kind}")
    if encoding == "utf-8" and b"\0" in head[:64]:
        raise ValueError(f"data.table={table}: not a CSV file, or in UTF-16 without a mark; save it as UTF-8")
    text = codecs.getincrementaldecoder(encoding)(errors="replace").decode(head)
    if not text.strip():
        raise ValueError(f"data.table={table}: cannot be read (it is empty)")
    separator, columns = _separator(text, wanted)
    places = _places(columns, wanted, table)

    def chunks() -> Iterator[Chunk]:
        with errors_of(table), fsspec.open(table, "rt", encoding=encoding, newline="") as lines:
            try:
                rows = _whole_rows(csv.reader(lines, delimiter=separator, strict=True), len(columns), table)
                while chunk := [*islice(rows, CHUNK)]:
                    yield {name: [row[place] for row in chunk] for name, place in places.items()}
            except UnicodeDecodeError:
                raise ValueError(f"data.table={table}: {_where_not(encoding, table)}") from None

    return Rows(columns, None, chunks())


def _separator(text: str, wanted: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return the separator with which a file has most of the wanted columns, or else most at all; and its columns."""

    def columns(separator: str) -> tuple[str, ...]:
        with contextlib.suppress(csv.Error):
            return tuple(
                next((row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if row), ())
            )
        return ()

    def score(separator: str) -> tuple[int, int]:
        names = [name.strip().lower() for name in columns(separator)]
        return sum(name in names for name in wanted), len(names)

    best = max(SEPARATORS, key=score)
    return best, columns(best)


def _whole_rows(reader: Iterable[list[str]], width: int, table: str) -> Iterator[list[str]]:
    """Yield the rows below the header, but none that is empty. ValueError names one that has not `width` values."""
    number = -1
    try:
        for row in reader:
            if not any(row):
                continue
            number += 1
            if len(row) != width and (len(row) < width or any(row[width:])):
                raise ValueError(
                    f"data.table={table}: row {number} has {len(row)} values, but there are {width} columns: "
                    f"{','.join(row)[:80]!r}; put quotes around a value that has a separator or a line break in it"
                )
            if number:
                yield row
    except csv.Error as error:
        raise ValueError(
            f"data.table={table}: row {number + 1} cannot be read ({error}); is a quote opened in it and not closed?"
        ) from None


def _where_not(encoding: str, table: str) -> str:
    """Say which line of a file is not in its encoding."""
    import fsspec

    if encoding == "utf-16":
        return "it begins with UTF-16's byte order mark, and is not UTF-16 throughout; save it as UTF-8"
    with fsspec.open(table, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                shown = line[max(0, error.start - 20) : error.start + 10].strip()
                return (
                    f"line {number} is not UTF-8 ({shown!r}); it seems to be Latin-1 or Windows-1252: save it as "
                    f"UTF-8, or use iconv -f WINDOWS-1252 -t UTF-8"
                )
    raise AssertionError


def _parquet_rows(table: str, wanted: Sequence[str]) -> Rows:
    import fsspec
    from pyarrow import parquet

    with errors_of(table), fsspec.open(table, "rb") as file:
        schema = parquet.ParquetFile(file).schema_arrow
    places = _places(schema.names, wanted, table)
    if "path" in wanted and "path" not in places:
        holding = [name for name in schema.names if _holds_pictures(schema.field(name).type)]
        if len(holding) == 1:
            places["path"] = schema.names.index(holding[0])
    names = {name: schema.names[place] for name, place in places.items()}
    path = names.get("path")
    pictures = path if path is not None and _holds_pictures(schema.field(path).type) else None

    def chunks() -> Iterator[Chunk]:
        with errors_of(table), fsspec.open(table, "rb") as file:
            first, columns = 0, [*names.values()] or schema.names[:1]
            if pictures is not None:  # but not their bytes
                part = "path" if "path" in _fields(schema.field(pictures).type) else "bytes"
                columns = [f"{name}.{part}" if name == pictures else name for name in columns]
            for batch in parquet.ParquetFile(file).iter_batches(CHUNK if pictures is None else 1024, columns=columns):
                chunk = {}
                for name, column in names.items():
                    if column == pictures:
                        chunk[name] = _names_of_pictures(batch.column(column), first)
                    else:
                        chunk[name] = _texts(batch.column(column), column, table, first)
                first += len(batch)
                yield chunk

    return Rows(tuple(schema.names), pictures, chunks())


def _holds_pictures(kind: "pa.DataType") -> bool:
    """Whether a column has the pictures themselves: bytes, alone or with a path, as Hugging Face's datasets write."""
    return "bytes" in _fields(kind)


def _fields(kind: "pa.DataType") -> list[str]:
    """Return the names of the parts of a column of structs; none for other columns."""
    import pyarrow as pa

    return [kind.field(place).name for place in range(kind.num_fields)] if pa.types.is_struct(kind) else []


def _names_of_pictures(column: "pa.Array", first: int) -> list[str]:
    """Return a name for each picture of a column of structs: its row, and its path where it has one."""
    paths = [entry and entry.get("path") for entry in column.to_pylist()]
    return [f"{first + place}:{path or 'picture'}" for place, path in enumerate(paths, 1)]


def _texts(column: "pa.Array", name: str, table: str, first: int) -> list[str]:
    """Return a column as texts, "" where a value is missing; whole numbers that were made fractions are whole again."""
    import pyarrow as pa

    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_null(kind):
        return [""] * len(column)
    if pa.types.is_floating(kind):  # where a number is missing, pandas makes fractions of all
        return ["" if x is None or x != x else str(int(x)) if x.is_integer() else repr(x) for x in column.to_pylist()]
    if pa.types.is_nested(kind):
        raise ValueError(f"data.table={table}: column {name} is of type {kind}; it should hold texts or numbers")
    try:
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
            return [(value or b"").decode() for value in column.to_pylist()]
        return [value or "" for value in column.cast(pa.string()).to_pylist()]
    except (pa.ArrowException, UnicodeDecodeError):
        rows = f"rows {first + 1} to {first + len(column)}"
        raise ValueError(f"data.table={table}: column {name} is of type {kind}, and {rows} are no texts") from None
