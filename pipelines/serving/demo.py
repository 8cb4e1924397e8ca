"""`dml demo`: an index with the pictures that it is of, which are asked for by number, and questions to it."""

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import parquet
from rich.console import Console
from torchvision.transforms.functional import to_pil_image

from dml_core.data import files
from dml_core.data.datasets import LabelledImages, names_array
from dml_core.data.pictures import BadPicture, decode
from dml_core.retrieval.index import Options
from pipelines.config import schema
from pipelines.models.checkpoint import model_fingerprint, read_config
from pipelines.models.find import find_checkpoint
from pipelines.serving import embed
from pipelines.serving.index import Index, open_index
from pipelines.serving.index_build import IndexRequest, build_index

SIDE = 320  # of the pictures shown, in pixels

MAY_DIFFER = ("data.root", "data.links")  # of an index that is there already


@dataclass(frozen=True)
class Demo:
    """pictures: of the items, in their order; their labels are the index's."""

    index: Index
    pictures: LabelledImages

    def content(self, item: int) -> bytes:
        """An item's picture, encoded. BadPicture, ConnectionError: it cannot be read."""
        if self.pictures.files is not None:
            return self.pictures.content(item)
        return _encoded(self.pictures.picture(item, SIDE), "PNG")

    def ask(self, picture: bytes, k: int, plain: bool) -> dict[str, Any]:
        """As index.Index.ask, and `shown`: the picture as `small` makes it."""
        return self.index.ask(picture, k, plain) | {"shown": small_picture(picture)}


def small_picture(picture: bytes) -> bytes:
    """A WebP to show of an encoded picture. BadPicture where it cannot be read."""
    return _encoded(decode(picture, SIDE, "the picture"), "WEBP")


def _encoded(picture: Any, kind: str) -> bytes:
    file, image = io.BytesIO(), to_pil_image(picture)
    image.thumbnail((SIDE, SIDE))
    image.save(file, kind, quality=90)
    return file.getvalue()


@contextmanager
def open_demo(run: str, folder: str | None, assignments: dict[str, Any], console: Console) -> Iterator[Demo]:
    """run: see jobs.find_checkpoint; or the folder of an index.  folder: of an index by that run; None: one of its test
    pictures is built for the time of the block.  assignments: config values to replace.
    ValueError where something is missing, or the pictures are not where they were. launch.RunFailed: on the way.
    """
    if folder is None and (Path(run) / "index.json").is_file():
        yield _opened(run, schema.flatten(assignments))
    elif folder is not None:
        demo = _opened(folder, schema.flatten(assignments))
        if demo.index.about.fingerprint != model_fingerprint(find_checkpoint(run)):
            raise ValueError(f"--index {folder}: built by another model than {run}")
        yield demo
    else:
        found = find_checkpoint(run)
        aware = read_config(found).namr is not None
        with tempfile.TemporaryDirectory(prefix="dml-") as scratch:
            console.print(
                "no --index: the run's test pictures are embedded first, for this time only; "
                f"dml index build {run} --out INDEX makes an index to keep, of all its pictures",
                highlight=False,
                markup=False,
            )
            wanted = IndexRequest("flat", aware, 250_000, Options())
            made = build_index(str(found), f"{scratch}/index", wanted, None, assignments, console, "test")
            yield _opened(made["index"], {})


def _opened(folder: str, values: dict[str, Any]) -> Demo:
    """values: of MAY_DIFFER."""
    if unfit := sorted({*values} - {*MAY_DIFFER}):
        allowed = " and ".join(MAY_DIFFER)
        raise ValueError(f"{unfit[0]} cannot act: the pictures are embedded already; {allowed} tell where they are now")
    found = open_index(folder)
    demo = Demo(found, _pictures(found, values))
    try:
        demo.ask(demo.content(0), 1, True)  # also so that the first visitor need not wait for the model
    except (BadPicture, OSError) as error:
        raise ValueError(f"{folder}: its pictures are not at hand ({error}); data.root=FOLDER tells where") from None
    return demo


def _pictures(found: Index, values: dict[str, Any]) -> LabelledImages:
    items = parquet.read_table(found.folder / "items.parquet", columns=["path", "label"])
    unlabelled = np.zeros(len(items), np.int64), ("",)
    if not items["path"].null_count:
        if (root := values.get("data.root", found.about.root)) is None:
            raise ValueError(f"{found.folder}: it is not noted where its pictures are; data.root=FOLDER tells")
        names = names_array(items["path"].to_pylist())
        files.check_names(names, f"{found.folder}/items.parquet")
        return LabelledImages(names, *unlabelled, files.below(root, values.get("data.links", False)))
    config, labels = found.model.config, items["label"].to_pylist()
    for part in ("test", "own"):
        drawn = embed.pictures(config, part)
        if [drawn.class_names[label] for label in drawn.labels.tolist()] == labels:
            return drawn
    raise ValueError(f"{found.folder}: its characters are not those that are drawn here")
