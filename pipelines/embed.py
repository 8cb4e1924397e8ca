"""`dml embed`: pictures to a Parquet file of unit vectors, on all workers.

Each worker embeds the blocks of the set that are its own (neighbors.owned_rows) and writes each, as a row group, to a
part of its own beside the file. The driver then copies row group after row group into the file, in the order of the
set: nobody ever holds more than a block, and the file does not tell how many workers there were.
"""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.fs
import torch
from pyarrow import parquet
from rich.console import Console
from torch import Tensor

from dml_core.data.datasets import LabelledImages
from dml_core.gather import rank, world_size
from dml_core.retrieval.neighbors import block_rows
from pipelines import build, check, checkpoint, embedder, evaluate, jobs, launch
from pipelines.config import Config, flatten
from pipelines.recipe import replaced

Part = Literal["given", "own", "test"]
ABOUT = b"dml"  # key of the schema's metadata, whose value is JSON: what was embedded by what


class Plan(NamedTuple):
    """What is to be embedded by what: checked, and nothing begun.

    checkpoint: the model's folder, `model` its config.  config: that of this job.  part: see `pictures`.  about: the
    file's metadata.
    """

    checkpoint: Path
    model: Config
    config: Config
    part: Part
    unreadable: list[str]
    rows: int
    about: dict[str, Any]


def plan(
    run: str, images: str | None, assignments: dict[str, Any], console: Console, own: Literal["own", "test"] = "own"
) -> Plan:
    """run: see jobs.find_checkpoint.  images: a folder or a table of pictures; None: the run's own.  own: all of these,
    or the test pictures.  assignments: config values to replace. ValueError where something is missing."""
    found = jobs.find_checkpoint(run)
    model = checkpoint.read_config(found)
    values = _of_images(model, images) if images else {}
    part: Part = "given" if images else own
    config = jobs.absolute(replaced(model, values | flatten(assignments)))
    unreadable = check.unreadable(config.data, console, labelled=images is None)
    with console.status("reading the data"):
        chosen = pictures(config, part, unreadable)
    where = run if "://" in run else str(found)  # what comes from a bucket is a copy for the time being
    about = {
        "model": {"run": run, "checkpoint": where, "fingerprint": embedder.fingerprint(found)},
        "config": model.model_dump(exclude_none=True),
        "root": chosen.files.root if chosen.files else None,
    }
    return Plan(found, model, config, part, unreadable, len(chosen), about)


def _of_images(model: Config, images: str) -> dict[str, Any]:
    """Config values for pictures that come by once: a frozen backbone's features of them are not kept."""
    is_table = images.lower().endswith((".csv", ".parquet"))
    place = {"name": "table", "table": images} if is_table else {"name": "folder", "root": images}
    kept = {"image_size": model.data.image_size, "on_bad_image": model.data.on_bad_image}
    return {"backbone.frozen": False, "data": place | kept}


def pictures(config: Config, part: Part, unreadable: Sequence[str] = ()) -> LabelledImages:
    """Those that the config names, with or without labels; or the run's own set, or its test pictures, in its order."""
    if part == "given":
        return build.collection(config.data, unreadable, labelled=False).images
    splits = build.splits(config, unreadable)
    whole = splits.train.whole or splits.train
    if part == "own":
        return whole
    task = splits.tests["test"]
    return whole.rows(np.sort(np.concatenate([side.places for side in (task.query, task.gallery) if side])))


def target(out: str) -> tuple[str, pyarrow.fs.FileSystem, str]:
    """Where `out` is: absolute or a URL, its file system, its path there. ValueError where no new file can be."""
    if not out.endswith(".parquet"):
        raise ValueError(f"--out {out}: not a name that ends with .parquet")
    out = out if "://" in out else str(Path(out).expanduser().resolve())
    try:
        files, path = pyarrow.fs.FileSystem.from_uri(out)
        if files.get_file_info(path).type != pyarrow.fs.FileType.NotFound:
            raise ValueError("it exists already; remove it or choose another name")
        files.create_dir(f"{path}.parts", recursive=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"--out {out}: cannot be written to ({str(error).splitlines()[0]})") from None
    return out, files, path


def embed(plan: Plan, out: str, console: Console) -> dict[str, Any]:
    """Write the file. Returns what `dml embed --json` prints. ValueError where `out` exists or cannot be written."""
    started = time.monotonic()
    out, files, path = target(out)
    config = plan.config
    job = {"part": plan.part, "unreadable": plan.unreadable, "parts": out}
    try:
        with launch.cluster(config, None), launch.scratch_storage() as scratch:
            job["checkpoint"] = launch.held(plan.checkpoint, embedder.FILES)
            resolved = launch.resolve_devices(config)
            workers = int(launch.run(embed_loop, resolved, job, scratch, "embed", console)["workers"])
        _join(files, path, schema(config).with_metadata({ABOUT: json.dumps(plan.about)}), plan.rows, workers)
    finally:
        files.delete_dir(f"{path}.parts")
    seconds = time.monotonic() - started
    facts = {"file": out, "rows": plan.rows, "dim": config.embedding_dim, "structure": config.namr is not None}
    facts |= {"left_out": len(plan.unreadable), **plan.about["model"]}
    return facts | {"seconds": seconds, "images_per_second": plan.rows / seconds}


def schema(config: Config) -> pa.Schema:
    vector = pa.list_(pa.float32(), config.embedding_dim)
    fields = [("id", pa.int64()), ("path", pa.string()), ("label", pa.string()), ("vector", vector)]
    return pa.schema(fields + [("structure", vector)] * (config.namr is not None))


def writer(sink: Any, columns: pa.Schema) -> parquet.ParquetWriter:
    """Dictionaries for labels alone: there are none in paths and vectors."""
    return parquet.ParquetWriter(sink, columns, use_dictionary=["label"])


def embed_loop(job: dict[str, Any]) -> dict[str, float]:
    """Write the blocks of one worker of several. Returns how many there are.

    job: as of evaluate.evaluate_loop, and part (as in Plan), parts (the file beside which the parts go).
    """
    sources = evaluate.of_checkpoint(job)
    images = pictures(sources.config, job["part"], job["unreadable"])
    files, path = pyarrow.fs.FileSystem.from_uri(job["parts"])
    columns = schema(sources.config)
    batches = evaluate.stream(images, sources, "embedding", partial(embedder.vectors, sources.learner))
    with files.open_output_stream(_part(path, rank())) as sink, writer(sink, columns) as part:
        for block in _blocks(batches, block_rows(len(images))):
            part.write_table(_table(images, block, columns))
    return {"workers": world_size()}


def _part(path: str, number: int) -> str:
    return f"{path}.parts/{number:05d}.parquet"


def _blocks(batches: Iterable[dict[str, Tensor]], size: int) -> Iterator[dict[str, Tensor]]:
    """Batches put together to blocks of `size` rows; the last one of a set may be shorter."""
    held = list[dict[str, Tensor]]()
    for batch in batches:
        held.append({name: rows.cpu() for name, rows in batch.items()})
        if sum(len(part["sample"]) for part in held) == size:
            yield _stacked(held)
            held = []
    if held:
        yield _stacked(held)


def _stacked(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _table(images: LabelledImages, block: dict[str, Tensor], columns: pa.Schema) -> pa.Table:
    ids = block["sample"].numpy()
    rows = slice(ids[0], ids[-1] + 1)
    names = images.image(rows).tolist() if images.files else [None] * len(ids)
    labels = [images.class_names[label] or None for label in images.labels[rows].tolist()]
    lists = [
        pa.FixedSizeListArray.from_arrays(pa.array(block[column.name].flatten().numpy()), type=column.type)
        for column in columns
        if pa.types.is_fixed_size_list(column.type)
    ]
    texts = [pa.array(values, pa.string()) for values in (names, labels)]
    return pa.Table.from_arrays([pa.array(ids), *texts, *lists], schema=columns)


class Embeddings:
    """A file of `dml embed`, read row group by row group. ValueError where it is not one.

    source: absolute, or a URL.  model: run, checkpoint and fingerprint; root: of the paths; both from its metadata.
    rows, dim: how many vectors of how many numbers.
    """

    def __init__(self, source: str):
        try:
            files, path = pyarrow.fs.FileSystem.from_uri(source)
            self.file = parquet.ParquetFile(files.open_input_file(path))
        except (OSError, ValueError) as error:
            raise ValueError(f"{source}: cannot be read ({str(error).splitlines()[0]})") from None
        columns, metadata = self.file.schema_arrow, self.file.schema_arrow.metadata or {}
        missing = [f"column {name}" for name in ("path", "label", "vector") if name not in columns.names]
        missing += [] if ABOUT in metadata else ["metadata of its model"]
        if missing:
            raise ValueError(f"{source}: not a file of dml embed: no {', no '.join(missing)}")
        about = json.loads(metadata[ABOUT])
        self.model, self.root = about["model"], about["root"]
        self.rows, self.dim = self.file.metadata.num_rows, columns.field("vector").type.list_size
        self.structure = "structure" in columns.names

    def tables(self, columns: list[str], start: int = 0, end: int | None = None) -> Iterator[tuple[int, pa.Table]]:
        """(position of the first row, rows) of all, or of rows start ... end."""
        first, end = 0, self.rows if end is None else end
        for group in range(self.file.num_row_groups):
            last = first + self.file.metadata.row_group(group).num_rows
            if first < end and last > start:
                table = self.file.read_row_group(group, columns)
                yield max(first, start), table.slice(max(0, start - first), min(end, last) - max(first, start))
            first = last

    def vectors(self, start: int, end: int) -> np.ndarray:
        """(end - start, D) float32."""
        parts = [table["vector"] for _, table in self.tables(["vector"], start, end)]
        dense = [chunk.flatten().to_numpy() for part in parts for chunk in part.chunks]
        return np.concatenate(dense).reshape(-1, self.dim)


def _join(files: pyarrow.fs.FileSystem, path: str, columns: pa.Schema, rows: int, workers: int) -> None:
    """Block b is the row group b // workers of part b % workers."""
    with files.open_output_stream(f"{path}.parts/whole") as sink, writer(sink, columns) as whole:
        parts = [parquet.ParquetFile(files.open_input_file(_part(path, number))) for number in range(workers)]
        for block in range(-(-rows // block_rows(rows))):
            whole.write_table(parts[block % workers].read_row_group(block // workers))
    files.move(f"{path}.parts/whole", path)
