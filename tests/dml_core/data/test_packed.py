"""Tables that hold the pictures themselves, as Hugging Face's datasets are written."""

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from dml_core.data.loading import Views
from dml_core.data.pictures import BadPicture
from dml_core.data.user_sets import load_table


def encoded(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def table(folder: Path, column: str, entries: list, **options) -> str:
    labels = [number // 2 for number in range(len(entries))]
    parquet.write_table(pa.table({column: entries, "label": labels}), folder / "t.parquet", **options)
    return str(folder / "t.parquet")


@pytest.mark.parametrize("column", ["path", "image"])
@pytest.mark.parametrize("rows", [2, 100])
def test_pictures_in_a_column_are_read(tmp_path: Path, column: str, rows: int) -> None:
    entries = [{"bytes": encoded(shade), "path": "image.jpg" if shade % 2 else None} for shade in range(6)]
    images = load_table(table(tmp_path, column, entries, row_group_size=rows), None, cache=tmp_path / "cache").images
    assert images.names.tolist() == ["1:picture", "2:image.jpg", "3:picture", "4:image.jpg", "5:picture", "6:image.jpg"]
    assert [int(images.picture(index, 8)[0, 0, 0]) for index in (5, 0, 3, 1, 4, 2)] == [5, 0, 3, 1, 4, 2]
    elsewhere = pickle.loads(pickle.dumps(images))  # as it travels to another process
    assert elsewhere.picture(4, 8)[0, 0, 0] == 4
    (batch,) = Views(images, 8).batches([[(index, None) for index in range(6)]], processes=1)
    assert batch[:, 0, 0, 0].tolist() == [*range(6)]


def test_bytes_without_a_path_and_paths_without_bytes(tmp_path: Path) -> None:
    (tmp_path / "9.png").write_bytes(encoded(9))
    (tmp_path.parent / "secret.png").write_bytes(encoded(8))
    entries = [{"bytes": None, "path": path} for path in ("9.png", "../secret.png", "none.png", None)]
    images = load_table(table(tmp_path, "path", entries), None, cache=tmp_path).images
    assert images.picture(0, 8)[0, 0, 0] == 9
    for index, reason in ((1, "lead out of the root"), (2, "No such file"), (3, "No such file")):
        with pytest.raises(BadPicture, match=reason):
            images.picture(index, 8)
    images = load_table(table(tmp_path, "path", [{"bytes": encoded(7)}]), None, cache=tmp_path).images
    assert images.picture(0, 8)[0, 0, 0] == 7 and images.names.tolist() == ["1:picture"]


@pytest.mark.parametrize("served", [False, True])
def test_another_table_under_the_same_name_is_another_set(tmp_path: Path, web, served: bool) -> None:
    """Whatever is known of a server's files: fsspec would tell them apart by their URL alone."""
    url, identities = web(tmp_path)[0], []
    for shade in (1, 2):
        entries = [{"bytes": encoded(shade), "path": "a.png"}, {"bytes": None, "path": None}]
        path = table(tmp_path, "path", entries)
        os.utime(path, (shade, shade))
        whole = load_table(f"{url}/{Path(path).name}" if served else path, None, cache=tmp_path / "cache")
        assert whole.images.picture(0, 8)[0, 0, 0] == shade
        (tmp_path / f"another file {shade}").touch()
        assert whole.identity() == whole.identity()
        identities.append(whole.identity())
    assert identities[0].pictures != identities[1].pictures and identities[0].listing == identities[1].listing


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    entries = [{"bytes": encoded(1), "path": "a.png"}, {"bytes": b"torn", "path": "b.png"}]
    images = load_table(table(tmp_path, "path", entries), None, cache=tmp_path).images
    with pytest.raises(BadPicture, match=r"2:b\.png: not a picture"):
        images.picture(1, 8)


LARGE = """
import resource, sys
from pathlib import Path
from dml_core.data.user_sets import load_table
load_table(sys.argv[2], None, cache=Path(sys.argv[3])).images.read_file(0)  # imports
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
images = load_table(sys.argv[1], None, cache=Path(sys.argv[3])).images
assert len(images.read_file(299)) == 2**20 and len(images) == 300
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before / 1024)
"""


def test_a_row_group_need_not_fit_into_memory(tmp_path: Path) -> None:
    """300 MB in one row group take less than half of that."""
    small = table(tmp_path, "path", [{"bytes": encoded(1)}])
    (tmp_path / "large").mkdir()
    entries = pa.StructArray.from_arrays([pa.array([bytes(2**20)] * 300)], ["bytes"])
    large = table(tmp_path / "large", "path", entries, compression="none", use_dictionary=False)
    command = [sys.executable, "-c", LARGE, large, small, str(tmp_path / "cache")]
    assert float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) < 150
