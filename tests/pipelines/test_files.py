"""Files that are written whole or not at all."""

from pathlib import Path

import pytest

from pipelines.files import partial_file, write_atomically


def test_a_file_is_replaced_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "file.txt"
    write_atomically(path, "ä first")
    assert path.read_text("utf-8") == "ä first"
    with partial_file(path) as partial:
        partial.write_bytes(b"second")
        assert path.read_text("utf-8") == "ä first"
    assert path.read_bytes() == b"second"
    write_atomically(path, b"third")
    assert path.read_bytes() == b"third" and [*path.parent.iterdir()] == [path]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="disk is full"), partial_file(path) as partial:
        partial.write_text("half")
        raise OSError("disk is full")
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]
