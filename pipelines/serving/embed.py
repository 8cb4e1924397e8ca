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
from pipelines.cluster.devices import resolve_devices
from pipelines.cluster.launch import run_on_workers
from pipelines.cluster.session import open_cluster
from pipelines.cluster.transfer import put_files, scratch_storage
from pipelines.config import schema
from pipelines.config.identity import with_absolute_paths
from pipelines.config.recipe import with_values
from pipelines.config.schema import Config
from pipelines.data import check
from pipelines.data.sets import load_collection, load_splits
from pipelines.models.checkpoint import MODEL_FILES, model_fingerprint, read_config
from pipelines.models.embedder import embed_views
from pipelines.models.find import find_checkpoint
from pipelines.serving import vectors_file
from pipelines.serving.vectors_file import METADATA_KEY
from pipelines.training.evaluation import load_sources, stream_outputs

Part = Literal["given", "own", "test"]


class EmbeddingPlan(NamedTuple):
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


def plan_embedding(
    run: str, images: str | None, assignments: dict[str, Any], console: Console, own: Literal["own", "test"] = "own"
) -> EmbeddingPlan:
    """run: see jobs.find_checkpoint.  images: a folder or a table of pictures; None: the run's own.  own: all of these,
    or the test pictures.  assignments: config values to replace. ValueError where something is missing."""
    found = find_checkpoint(run)
    model = read_config(found)
    values = _of_images(model, images) if images else {}
    part: Part = "given" if images else own
    config = with_absolute_paths(with_values(model, values | schema.flatten(assignments)))
    unreadable = check.unreadable(config.data, console, labelled=images is None)
    with console.status("reading the data"):
        chosen = pictures(config, part, unreadable)
    where = run if "://" in run else str(found)  # what comes from a bucket is a copy for the time being
    about = {
        "model": {"run": run, "checkpoint": where, "fingerprint": model_fingerprint(found)},
        "config": model.model_dump(exclude_none=True),
        "root": chosen.files.root if chosen.files else None,
    }
    return EmbeddingPlan(found, model, config, part, unreadable, len(chosen), about)


def _of_images(model: Config, images: str) -> dict[str, Any]:
    """Config values for pictures that come by once: a frozen backbone's features of them are not kept."""
    is_table = images.lower().endswith((".csv", ".parquet"))
    place = {"name": "table", "table": images} if is_table else {"name": "folder", "root": images}
    kept = {"image_size": model.data.image_size, "on_bad_image": model.data.on_bad_image}
    return {"backbone.frozen": False, "data": place | kept}


def pictures(config: Config, part: Part, unreadable: Sequence[str] = ()) -> LabelledImages:
    """Those that the config names, with or without labels; or the run's own set, or its test pictures, in its order."""
    if part == "given":
        return load_collection(config.data, unreadable, labelled=False).images
    splits = load_splits(config, unreadable)
    whole = splits.train.whole or splits.train
    if part == "own":
        return whole
    task = splits.tests["test"]
    return whole.rows(np.sort(np.concatenate([side.places for side in (task.query, task.gallery) if side])))


def output_file(out: str) -> tuple[str, pyarrow.fs.FileSystem, str]:
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


def write_embeddings(plan: EmbeddingPlan, out: str, console: Console) -> dict[str, Any]:
    """Write the file. Returns what `dml embed --json` prints. ValueError where `out` exists or cannot be written."""
    started = time.monotonic()
    out, files, path = output_file(out)
    config = plan.config
    job = {"part": plan.part, "unreadable": plan.unreadable, "parts": out}
    try:
        with open_cluster(config, None), scratch_storage() as scratch:
            job["checkpoint"] = put_files(plan.checkpoint, MODEL_FILES)
            resolved = resolve_devices(config)
            workers = int(run_on_workers(embed_loop, resolved, job, scratch, "embed", console)["workers"])
        _join(
            files,
            path,
            vectors_file.schema(config).with_metadata({METADATA_KEY: json.dumps(plan.about)}),
            plan.rows,
            workers,
        )
    finally:
        files.delete_dir(f"{path}.parts")
    seconds = time.monotonic() - started
    facts = {"file": out, "rows": plan.rows, "dim": config.embedding_dim, "structure": config.namr is not None}
    facts |= {"left_out": len(plan.unreadable), **plan.about["model"]}
    return facts | {"seconds": seconds, "images_per_second": plan.rows / seconds}


def embed_loop(job: dict[str, Any]) -> dict[str, float]:
    """Write the blocks of one worker of several. Returns how many there are.

    job: as of evaluate.evaluate_loop, and part (as in Plan), parts (the file beside which the parts go).
    """
    sources = load_sources(job)
    images = pictures(sources.config, job["part"], job["unreadable"])
    files, path = pyarrow.fs.FileSystem.from_uri(job["parts"])
    columns = vectors_file.schema(sources.config)
    batches = stream_outputs(images, sources, "embedding", partial(embed_views, sources.learner))
    with files.open_output_stream(_part(path, rank())) as sink, vectors_file.writer(sink, columns) as part:
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


def _join(files: pyarrow.fs.FileSystem, path: str, columns: pa.Schema, rows: int, workers: int) -> None:
    """Block b is the row group b // workers of part b % workers."""
    with files.open_output_stream(f"{path}.parts/whole") as sink, vectors_file.writer(sink, columns) as whole:
        parts = [parquet.ParquetFile(files.open_input_file(_part(path, number))) for number in range(workers)]
        for block in range(-(-rows // block_rows(rows))):
            whole.write_table(parts[block % workers].read_row_group(block // workers))
    files.move(f"{path}.parts/whole", path)
