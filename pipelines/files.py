"""Local files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """Yield the path of a new file, beside `path`, that takes its name when the block ends.

    A block that fails leaves nothing behind, and what was at `path` before. Processes that write the same file at the
    same time do not meet; the last one to end wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a text, in UTF-8, or bytes."""
    with partial_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
