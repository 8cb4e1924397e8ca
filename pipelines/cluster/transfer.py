"""Send files from the driver to workers on any node, through Ray's memory: workers need not see the driver's disk."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import ray


@dataclass(frozen=True)
class SentFiles:
    """Files in Ray's memory, or in a folder of this machine, for a loop in the driver's own process.

    Attributes:
        content: One reference to {name: bytes}. Ray would fetch a bare one wherever it travels.
        folder: Where the files are, if they need not travel.
    """

    content: tuple[ray.ObjectRef, ...] = ()
    folder: Path | None = None


def send_files(folder: Path, names: Sequence[str]) -> SentFiles:
    """Put files of a folder into Ray's memory."""
    import ray

    return SentFiles((ray.put({name: np.fromfile(folder / name, np.uint8) for name in names}),))


@contextlib.contextmanager
def received_files(files: SentFiles) -> Iterator[Path]:
    """Yield a folder that holds the files, on this node, for the time of the block."""
    if files.folder is not None:
        yield files.folder
        return
    import ray

    with scratch_storage() as folder:
        for name, content in ray.get(files.content[0]).items():
            content.tofile(Path(folder, name))
        yield Path(folder)


@contextlib.contextmanager
def scratch_storage() -> Iterator[str]:
    """Yield a folder for what Ray Train wants to write when nothing is to be kept."""
    with tempfile.TemporaryDirectory(prefix="dml-") as folder:
        yield folder
