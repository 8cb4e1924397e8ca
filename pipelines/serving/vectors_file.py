"""The Parquet file of `dml embed`: its columns, its metadata, and how it is read."""

import json
from collections.abc import Iterator
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.fs
from pyarrow import parquet

from pipelines.config.schema import Config

METADATA_KEY = b"dml"  # of the Parquet schema's metadata, whose value is FileMetadata as JSON


class ModelOrigin(TypedDict):
    """The model that embedded a file: as it was named, its checkpoint's folder or URL, and its fingerprint."""

    run: str
    checkpoint: str
    fingerprint: str


class FileMetadata(TypedDict):
    """What was embedded by what: the model, the config it was trained by, and the root of the pictures' paths."""

    model: ModelOrigin
    config: dict[str, Any]
    root: str | None


def columns_of(config: Config) -> pa.Schema:
    """Return the file's columns: id, path, label, vector (D) and, with NAMR, structure (D)."""
    vector = pa.list_(pa.float32(), config.embedding_dim)
    fields = [("id", pa.int64()), ("path", pa.string()), ("label", pa.string()), ("vector", vector)]
    return pa.schema(fields + [("structure", vector)] * (config.namr is not None))


class Embeddings:
    """A file of `dml embed`, read row group by row group.

    Attributes:
        model: What embedded it.
        root: Of the pictures' paths; None: they have none.
        rows, dim: Number of vectors, and of numbers in each.
        structure: Whether it has structure embeddings.
    """

    def __init__(self, source: str):
        """Open a file at an absolute path or URL. ValueError where it is not one of `dml embed`."""
        try:
            files, path = pyarrow.fs.FileSystem.from_uri(source)
            self.file = parquet.ParquetFile(files.open_input_file(path))
        except (OSError, ValueError) as error:
            raise ValueError(f"{source}: cannot be read ({str(error).splitlines()[0]})") from None
        columns, metadata = self.file.schema_arrow, self.file.schema_arrow.metadata or {}
        missing = [f"column {name}" for name in ("path", "label", "vector") if name not in columns.names]
        missing += [] if METADATA_KEY in metadata else ["metadata of its model"]
        if missing:
            raise ValueError(f"{source}: not a file of dml embed: no {', no '.join(missing)}")
        about: FileMetadata = json.loads(metadata[METADATA_KEY])
        self.model, self.root = about["model"], about["root"]
        self.rows, self.dim = self.file.metadata.num_rows, columns.field("vector").type.list_size
        self.structure = "structure" in columns.names

    def tables(self, columns: list[str], start: int = 0, end: int | None = None) -> Iterator[tuple[int, pa.Table]]:
        """Yield (position of the first row, rows) of all rows, or of rows start to end."""
        first, end = 0, self.rows if end is None else end
        for group in range(self.file.num_row_groups):
            last = first + self.file.metadata.row_group(group).num_rows
            if first < end and last > start:
                table = self.file.read_row_group(group, columns)
                yield max(first, start), table.slice(max(0, start - first), min(end, last) - max(first, start))
            first = last

    def vectors(self, start: int, end: int) -> np.ndarray:
        """Read the vectors of rows start to end: (end - start, D) float32."""
        parts = [table["vector"] for _, table in self.tables(["vector"], start, end)]
        dense = [chunk.flatten().to_numpy() for part in parts for chunk in part.chunks]
        return np.concatenate(dense).reshape(-1, self.dim)
