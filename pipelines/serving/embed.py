"""Embed pictures into a Parquet file of unit vectors, on all workers.

Each worker embeds the blocks of the set that are its own (neighbors.owned_rows) and writes each, as a row group, to a
part of its own beside the file. The driver then copies row group after row group into the file, in the order of the
set: nobody ever holds more than a block, and the file does not tell how many workers there were.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from torch import Tensor

from dml_core.data.datasets import LabelledImages
from dml_core.gather import rank, world_size
from dml_core.retrieval.neighbors import block_rows
from pipelines.config.schema import Config, flatten
from pipelines.console import print_notes, stage
from pipelines.data.parts import join_parts, open_part, prepare_output, remove_parts
from pipelines.data.sets import load_collection, load_splits
from pipelines.models.checkpoint import model_fingerprint, read_config
from pipelines.models.embedder import embed_views
from pipelines.models.find import find_checkpoint
from pipelines.runs.with_model import TrainedModel, open_model, run_with_model
from pipelines.serving.job import EmbedJob, Part
from pipelines.serving.vectors_file import METADATA_KEY, FileMetadata, columns_of
from pipelines.training.evaluation import load_sources, stream_outputs


class EmbeddingPlan(NamedTuple):
    """What is to be embedded by what: checked, and nothing begun.

    Attributes:
        model: The trained model, and the config that it is used with.
        part: Which pictures, see EmbedJob.
        rows: How many there are.
        metadata: Of the file.
    """

    model: TrainedModel
    part: Part
    rows: int
    metadata: FileMetadata


class EmbeddingResult(TypedDict):
    """What `dml embed --json` prints."""

    file: str
    rows: int
    dim: int
    structure: bool
    left_out: int
    run: str
    checkpoint: str
    fingerprint: str
    seconds: float
    images_per_second: float


def plan_embedding(
    run: str,
    images: str | None,
    assignments: Mapping[str, Any],
    console: Console,
    own: Literal["own", "test"] = "own",
) -> EmbeddingPlan:
    """Check what is to be embedded by what.

    Args:
        run: See models.find.find_checkpoint.
        images: A folder or a table of pictures; None: the run's own.
        assignments: Config values to replace, nested or by dotted keys.
        console: Where progress is shown.
        own: Without `images`, the run's whole set or its test pictures.

    Raises:
        ValueError: Something is missing.
    """
    folder, values = find_checkpoint(run), flatten(dict(assignments))
    if images:
        values = _values_of_images(read_config(folder), images) | values
    model = open_model(folder, values, console, labelled=images is None)
    part: Part = "given" if images else own
    with stage(console, "reading the data"):
        if part == "given":
            collection = load_collection(model.config.data, model.unreadable, labelled=False)
            print_notes(console, collection.notes)
            pictures = collection.images
        else:
            pictures = pictures_of(model.config, part, model.unreadable)
    metadata = FileMetadata(
        model={
            "run": run,
            "checkpoint": run if "://" in run else str(model.checkpoint),  # what comes from a bucket is a copy
            "fingerprint": model_fingerprint(model.checkpoint),
        },
        config=model.trained_by.to_dict(),
        root=pictures.files.root if pictures.files else None,
    )
    return EmbeddingPlan(model, part, len(pictures), metadata)


def _values_of_images(model: Config, images: str) -> dict[str, Any]:
    """Return config values for pictures that come by once: a frozen backbone's features of them are not kept."""
    is_table = images.lower().endswith((".csv", ".parquet"))
    place = {"name": "table", "table": images} if is_table else {"name": "folder", "root": images}
    carried_over = {"image_size": model.data.image_size, "on_bad_image": model.data.on_bad_image}
    return {"backbone.frozen": False, "data": place | carried_over}


def pictures_of(config: Config, part: Part, unreadable: Sequence[str] = ()) -> LabelledImages:
    """Load the pictures to embed, in the set's order. part: see EmbedJob.  unreadable: names to leave out."""
    if part == "given":
        return load_collection(config.data, unreadable, labelled=False).images
    splits = load_splits(config, unreadable)
    whole = splits.train.whole or splits.train
    if part == "own":
        return whole
    task = splits.tests["test"]
    return whole.select(np.sort(np.concatenate([side.places for side in (task.query, task.gallery) if side])))


def write_embeddings(plan: EmbeddingPlan, out: str, console: Console) -> EmbeddingResult:
    """Embed what was planned, on workers, into a new file.

    Raises:
        ValueError: The file exists or cannot be written.
        RunFailed: Workers failed; nothing is left of the file.
    """
    started = time.monotonic()
    output, config = prepare_output(out), plan.model.config
    job = EmbedJob(config, plan.model.unreadable, plan.model.data, part=plan.part, out=output.address)
    try:
        workers = int(run_with_model(plan.model, job, "embed", console)["workers"])
        columns = columns_of(config).with_metadata({METADATA_KEY: json.dumps(plan.metadata)})
        join_parts(output, columns, plan.rows, workers)
    finally:
        remove_parts(output)
    seconds = time.monotonic() - started
    return EmbeddingResult(
        file=output.address,
        rows=plan.rows,
        dim=config.embedding_dim,
        structure=config.namr is not None,
        left_out=len(plan.model.unreadable),
        **plan.metadata["model"],
        seconds=seconds,
        images_per_second=plan.rows / seconds,
    )


def embed_loop(job: EmbedJob) -> dict[str, int]:
    """Write the blocks of one worker of several to a part of the file. Return how many workers there are."""
    sources = load_sources(job)
    images = pictures_of(sources.config, job.part, job.unreadable)
    columns = columns_of(sources.config)
    batches = stream_outputs(images, sources, "embedding", partial(embed_views, sources.learner))
    with open_part(job.out, rank(), columns) as part:
        for block in _blocks(batches, block_rows(len(images))):
            part.write_table(_table_of(images, block, columns))
    return {"workers": world_size()}


def _blocks(batches: Iterable[dict[str, Tensor]], size: int) -> Iterator[dict[str, Tensor]]:
    """Put batches together to blocks of `size` rows; the last one of a set may be shorter."""
    pending = list[dict[str, Tensor]]()
    for batch in batches:
        pending.append({name: rows.cpu() for name, rows in batch.items()})
        if sum(len(part["sample"]) for part in pending) == size:
            yield _stack(pending)
            pending = []
    if pending:
        yield _stack(pending)


def _stack(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _table_of(images: LabelledImages, block: dict[str, Tensor], columns: pa.Schema) -> pa.Table:
    ids = block["sample"].numpy()
    rows = slice(ids[0], ids[-1] + 1)
    names = images.entry(rows).tolist() if images.files else [None] * len(ids)
    labels = [images.class_names[label] or None for label in images.labels[rows].tolist()]
    lists = [
        pa.FixedSizeListArray.from_arrays(pa.array(block[column.name].flatten().numpy()), type=column.type)
        for column in columns
        if pa.types.is_fixed_size_list(column.type)
    ]
    texts = [pa.array(values, pa.string()) for values in (names, labels)]
    return pa.Table.from_arrays([pa.array(ids), *texts, *lists], schema=columns)
