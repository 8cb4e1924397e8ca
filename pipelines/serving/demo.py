"""What `dml demo` shows: an index with the pictures of its items."""

import io
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import parquet
from rich.console import Console
from torch import Tensor

from dml_core.data import files
from dml_core.data.datasets import LabelledImages, names_array
from dml_core.data.pictures import BadPicture, decode, to_image
from pipelines.config.schema import flatten
from pipelines.models.checkpoint import model_fingerprint, read_config
from pipelines.models.find import find_checkpoint
from pipelines.serving.embed import pictures_of
from pipelines.serving.index import Answer, Index, open_index
from pipelines.serving.index_build import IndexRequest, build_index
from pipelines.serving.job import Part

SIDE = 320  # most that a picture shown is wide or high, in pixels

PICTURE_KEYS = ("data.root", "data.links")  # config keys that may differ for an index that is there already


class DemoAnswer(Answer):
    """An answer, and the query as a small WebP."""

    thumbnail: bytes


@dataclass(frozen=True)
class Demo:
    """An index, and the pictures of its items in their order. Their labels are the index's."""

    index: Index
    pictures: LabelledImages

    def content(self, item: int) -> bytes:
        """Return an item's picture, encoded. BadPicture or OSError: it cannot be read."""
        if self.pictures.files is not None:
            return self.pictures.read_file(item)
        return _encode(self.pictures.picture(item, SIDE), "PNG")

    def ask(self, picture: bytes, k: int, plain: bool) -> DemoAnswer:
        """Find the items nearest to a picture; see Index.ask."""
        return {**self.index.ask(picture, k, plain), "thumbnail": make_thumbnail(picture)}


def make_thumbnail(picture: bytes) -> bytes:
    """Turn an encoded picture into a small WebP. BadPicture where it cannot be read."""
    return _encode(decode(picture, SIDE, "the picture"), "WEBP")


def _encode(picture: Tensor, image_format: str) -> bytes:
    file, image = io.BytesIO(), to_image(picture)
    image.thumbnail((SIDE, SIDE))
    image.save(file, image_format, quality=90)
    return file.getvalue()


@contextmanager
def open_demo(run: str, folder: str | None, assignments: Mapping[str, Any], console: Console) -> Iterator[Demo]:
    """Open an index with its pictures.

    Args:
        run: A run, see models.find.find_checkpoint; or the folder of an index.
        folder: Of an index by that run; None: one of its test pictures is built for the time of the block.
        assignments: Config values to replace, nested or by dotted keys.
        console: Where progress is shown.

    Raises:
        ValueError: Something is missing, or the pictures are not where they were.
        RunFailed: Workers that built the index failed.
    """
    values = flatten(dict(assignments))
    if folder is None and (Path(run) / "index.json").is_file():
        yield _open_index(run, values)
    elif folder is not None:
        demo = _open_index(folder, values)
        if demo.index.about.fingerprint != model_fingerprint(find_checkpoint(run)):
            raise ValueError(f"--index {folder}: built by another model than {run}")
        yield demo
    else:
        checkpoint = find_checkpoint(run)
        request = IndexRequest("flat", structure=read_config(checkpoint).namr is not None)
        with tempfile.TemporaryDirectory(prefix="dml-") as scratch:
            console.print(
                "no --index: the run's test pictures are embedded first, for this time only; "
                f"dml index build {run} --out INDEX makes an index to keep, of all its pictures",
                highlight=False,
                markup=False,
            )
            out = f"{scratch}/index"
            build_index(str(checkpoint), out, request, None, assignments, console, "test")
            yield _open_index(out, {})


def _open_index(folder: str, values: Mapping[str, Any]) -> Demo:
    """Open an index that is there already. values: of PICTURE_KEYS."""
    if unfit := sorted({*values} - {*PICTURE_KEYS}):
        allowed = " and ".join(PICTURE_KEYS)
        raise ValueError(f"{unfit[0]} cannot act: the pictures are embedded already; {allowed} tell where they are now")
    index = open_index(folder)
    demo = Demo(index, _find_pictures(index, values))
    try:
        demo.ask(demo.content(0), 1, True)  # also so that the first visitor need not wait for the model
    except (BadPicture, OSError) as error:
        raise ValueError(f"{folder}: its pictures are not at hand ({error}); data.root=FOLDER tells where") from None
    return demo


def _find_pictures(index: Index, values: Mapping[str, Any]) -> LabelledImages:
    """Find the pictures of an index's items: below the root of their paths or, where they have none, drawn again."""
    items = parquet.read_table(index.folder / "items.parquet", columns=["path", "label"])
    unlabelled = np.zeros(len(items), np.int64), ("",)
    if not items["path"].null_count:
        if (root := values.get("data.root", index.about.root)) is None:
            raise ValueError(f"{index.folder}: it is not noted where its pictures are; data.root=FOLDER tells")
        names = names_array(items["path"].to_pylist())
        files.check_names(names, f"{index.folder}/items.parquet")
        return LabelledImages(names, *unlabelled, files.below(root, values.get("data.links", False)))
    config, labels = index.model.config, items["label"].to_pylist()
    parts: tuple[Part, ...] = ("test", "own")
    for part in parts:
        drawn = pictures_of(config, part)
        if [drawn.class_names[label] for label in drawn.labels.tolist()] == labels:
            return drawn
    raise ValueError(f"{index.folder}: its characters are not those that are drawn here")
