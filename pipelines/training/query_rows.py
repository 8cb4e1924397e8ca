"""The file of `dml evaluate --out`: a row for each query, with its scores and its nearest pictures."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch

from dml_core.data.datasets import LabelledImages, Retrieval
from dml_core.gather import rank
from dml_core.retrieval.neighbors import block_rows
from dml_core.retrieval.ranked import RankedQueries
from pipelines.data.parts import open_part

NEIGHBORS = 10  # of each query
SCORES = {"recall_at_1": "recall_at_1", "map_at_r": "average_precision_at_r"}  # of a query: metric -> column
COLUMNS = pa.schema(
    [
        *(("path", pa.string()), ("label", pa.string()), ("matches", pa.int64())),
        *((column, pa.float64()) for column in SCORES.values()),
        ("neighbor_paths", pa.list_(pa.string())),
        ("neighbor_labels", pa.list_(pa.string())),
        ("neighbor_similarities", pa.list_(pa.float64())),
        ("neighbor_positions", pa.list_(pa.int64())),  # in the gallery, which is the queries where there is no other
    ]
)


def write_queries(out: str, task: Retrieval, ranked: RankedQueries) -> None:
    """Write the queries of this rank to its part of a file, a row group for each block.

    Scores are null where the gallery has no match. Paths are null where pictures are embedded in the program.

    Args:
        out: The address of the file.
        task: The pictures.
        ranked: What the queries have found.
    """
    with open_part(out, rank(), COLUMNS) as part:
        for table in _tables(task, ranked):
            part.write_table(table)


def _tables(task: Retrieval, ranked: RankedQueries) -> Iterator[pa.Table]:
    gallery, size = task.gallery or task.query, block_rows(len(task.query))
    scores = [ranked.scores[metric].cpu().numpy() for metric in SCORES]
    matches, rows = ranked.task.matches[ranked.rows].cpu().numpy(), ranked.rows.cpu().numpy()
    for number, best in enumerate(ranked.neighbors):
        block = slice(number * size, (number + 1) * size)
        found = (best.position[:, :NEIGHBORS] >= 0).cpu().numpy()
        position = best.position[:, :NEIGHBORS].cpu().numpy()[found]
        similarity = best.similarity[:, :NEIGHBORS].cpu().to(torch.float64).numpy()[found]
        offsets = pa.array(np.concatenate([[0], found.sum(1).cumsum()]), pa.int32())
        lists = _paths(gallery, position), _labels(gallery, position), pa.array(similarity), pa.array(position)
        unmatched = matches[block] == 0
        yield pa.Table.from_arrays(
            [
                _paths(task.query, rows[block]),
                _labels(task.query, rows[block]),
                pa.array(matches[block]),
                *(pa.array(score[block], mask=unmatched) for score in scores),
                *(pa.ListArray.from_arrays(offsets, values) for values in lists),
            ],
            schema=COLUMNS,
        )


def _paths(images: LabelledImages, samples: np.ndarray) -> pa.Array:
    """Return names of files, null where there are none."""
    if images.files is None:
        return pa.nulls(len(samples), pa.string())
    return _texts(images.entry(samples).tolist())


def _labels(images: LabelledImages, samples: np.ndarray) -> pa.Array:
    return _texts([images.class_names[label] for label in images.labels[samples].tolist()])


def _texts(names: list[str]) -> pa.Array:
    """Return names as texts of Arrow. What is not UTF-8 in them becomes a question mark."""
    return pa.array([name.encode("utf-8", "replace").decode() for name in names], pa.string())
