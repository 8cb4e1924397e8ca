"""Files from the driver to workers on any node, through Ray's memory."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train


def put_files(folder: Path, names: Sequence[str]) -> list[Any]:
    """Files of a folder in Ray's memory, for `unpacked` on any node: workers need not see our disk."""
    return [ray.put({name: np.fromfile(folder / name, np.uint8) for name in names})]


@contextlib.contextmanager
def unpacked_files(files: list[Any]) -> Iterator[Path]:
    """A folder with the files that are `held`, for the time of the block."""
    with scratch_storage() as folder:
        for name, content in ray.get(files[0]).items():
            content.tofile(Path(folder, name))
        yield Path(folder)


@contextlib.contextmanager
def scratch_storage() -> Iterator[str]:
    """A place for what Ray Train wants to write when nothing is to be kept."""
    with tempfile.TemporaryDirectory(prefix="dml-") as folder:
        yield folder
