"""Tables as Excel, pandas, Spark, Hugging Face and old machines write them: read, or refused in one line."""

import codecs
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from dml_core.data.datasets import BOTH, GALLERY, NEITHER, QUERY, Collection
from dml_core.data.user_sets import load_table

PATHS = [f"{label}/{number}.png" for label in "ab" for number in range(3)]
LABELS = [path[0] for path in PATHS]
PLAIN = "path,label\n" + "".join(f"{path},{label}\n" for path, label in zip(PATHS, LABELS, strict=True))


def read(content: str | bytes, folder: Path, **options) -> Collection:
    path = folder / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_table(str(path), None, **options)


def of_columns(folder: Path, **columns) -> Collection:
    parquet.write_table(pa.table(columns), folder / "t.parquet")
    return load_table(str(folder / "t.parquet"), None)


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(ValueError) as error:
        call(*arguments, **options)
    text = str(error.value)
    assert text.startswith("data.table=") and "\n" not in text
    return text


WRITTEN = {
    "carriage returns": PLAIN.replace("\n", "\r").encode(),
    "Windows": PLAIN.replace("\n", "\r\n").encode(),
    "semicolons": PLAIN.replace(",", ";").encode(),
    "tabs": PLAIN.replace(",", "\t").encode(),
    "bars": PLAIN.replace(",", "|").encode(),
    "UTF-8 with a mark": codecs.BOM_UTF8 + PLAIN.encode(),
    "UTF-16": PLAIN.encode("utf-16"),
    "UTF-16, big-endian, with tabs": codecs.BOM_UTF16_BE + PLAIN.replace(",", "\t").encode("utf-16-be"),
    "quotes": ('"path","label"\n' + "".join(f'"{p}","{p[0]}"\n' for p in PATHS)).encode(),
    "spaces and capitals in the header": PLAIN.replace("path,label", " Path , LABEL ").encode(),
    "empty lines": PLAIN.replace("\n", "\n\n").encode() + b",\n,\n",
    "empty columns of Excel": PLAIN.replace("\n", ",,\n").replace("label,,", "label").encode(),
    "other columns, one with line breaks": b'note,path,label\n' + "".join(
        f'"a, ""b""\nc",{p},{p[0]}\n' for p in PATHS).encode(),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITTEN)
def test_csv_of_all_kinds(tmp_path: Path, kind: str) -> None:
    images = read(WRITTEN[kind], tmp_path).images
    assert images.names.tolist() == PATHS and images.class_names == ("a", "b")
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_csv_in_memory_is_the_same(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/tables/t.csv", WRITTEN["UTF-16"])
    images = load_table("memory://tables/t.csv", None).images
    assert images.names.tolist() == PATHS and images.files.root == "memory://tables"
    memory.rm("/tables", recursive=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"path,label\na.png,x\nb.png,y,z\n", "row 2 has 3 values, but there are 2 columns: 'b.png,y,z'"),
        (b"path,label\na.png,x\nb.png\n", "row 2 has 1 values, but there are 2 columns"),
        (b"path,label\na.png,x\nb.png,caf\xe9\n", "line 3 is not UTF-8 (b'b.png,caf\\xe9'); it seems to be Latin-1"),
        ("path,label\na,x\n".encode("utf-16-le"), "UTF-16 without a mark; save it as UTF-8"),
        (b"PK\x03\x04rest", "it seems to be an Excel workbook or a zip archive"),
        (b"PAR1rest", "it seems to be a Parquet file, whose name ends with .parquet"),
        (b'path,label\n"a.png,x\nb.png,y\n', "row 1 cannot be read (unexpected end of data); is a quote opened in it"),
        (b'path,label\na.png,"x\nb.png,y\nc.png,"z\n', "is a quote opened in it and not closed?"),
        (b'path,label\na.png,"x\nb.png,y"\n', "label in row 1 has a line break: 'x\\nb.png,y'; is a quote not"),
        (b"a.png,x\nb.png,y\n", "there are a.png, x; the first line must name the columns, path,label"),
        (b"path,label,split\na.png,x,train\nb.png,y,1\n", "split '1' is not one of train, training"),
        (b"path,label,label\na,b,c\n", "several columns are called label; rename all but one"),
        (b"image_path,label\na,b\n", "no column path; there are image_path, label; if image_path is meant, rename it"),
        (b"path,class\na,b\n", "no column label; there are path, class; if class is meant, rename it to label"),
        (b"path:label\na:b\n", "is the separator something else"),
        (b"path,label\n./a.png,x\na.png,x\n", "the path 'a.png' comes more than once, in rows 1 and 2"),
        (b"path,label\nd//a.png,x\nb.png,x\nd/./a.png,y\n", "the path 'd/a.png' comes more than once, in rows 1 and 3"),
        (b"path,label\nd\\a.png,x\n", "the path in row 1 has backslashes; write / between folders: 'd\\\\a.png'"),
        (b"path,label\n/data/pics/a.png,x\n/data/more/b.png,x\n", "data.root=/data has them all"),
        (b"path,label\n../a.png,x\n", "1 paths lead out of the root, '../a.png' first"),
        (b"path,label\na.png, \n", "row 1 has no label"),
        (b"path,label\na.png,3.0\nb.png,nan\n", "row 2 has no label (nan)"),
        (b"path,label,camera,sequence\na.png,x,1,2\n", "the columns camera and sequence mean the same here"),
        (b"path,label,role,is_query\na.png,x,query,1\n", "the columns role and is_query say the same"),
        (b"path,label,is_query\na.png,x,maybe\n", "is_query 'maybe' is not one of 0, 0.0, false, no, 1"),
    ],
)  # fmt: skip
def test_csv_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    assert message in refusal(read, content, tmp_path)


@pytest.mark.parametrize("name", ["none.csv", "none.parquet", "folder.csv", "folder.parquet"])
def test_no_file(tmp_path: Path, name: str) -> None:
    if name.startswith("folder"):
        (tmp_path / name).mkdir()
    reason = "Is a directory" if name.startswith("folder") else "No such file or directory"
    assert f"{name}: cannot be read ({reason})" in refusal(load_table, str(tmp_path / name), None)


def dictionary(values: list) -> pa.Array:
    return pa.array(values).dictionary_encode()


@pytest.mark.parametrize(
    "labels",
    [
        pa.array(LABELS, pa.large_string()),
        pa.array(LABELS, pa.string_view()),
        pa.array([label.encode() for label in LABELS]),
        dictionary(LABELS),
        pd.Series(LABELS, dtype="category"),
    ],
    ids=lambda labels: str(getattr(labels, "type", "category")),
)
def test_columns_of_texts(tmp_path: Path, labels) -> None:
    assert of_columns(tmp_path, path=PATHS, label=labels).images.class_names == ("a", "b")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (pa.array([9, 9, 10, 10, 2, 2], pa.int8()), ("2", "9", "10")),
        (pa.array([9.0, 9, 10, 10, 2, 2]), ("2", "9", "10")),
        (pa.array([0.5, 9, 10, 10, 2, 2], pa.float32()), ("0.5", "2", "9", "10")),
        (dictionary([9, 9, 10, 10, 2, 2]), ("2", "9", "10")),
        (pa.array([True, False] * 3), ("false", "true")),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_columns_of_numbers(tmp_path: Path, labels: pa.Array, classes: tuple[str, ...]) -> None:
    assert set(of_columns(tmp_path, path=PATHS, label=labels).images.class_names) == set(classes)


@pytest.mark.parametrize(
    "labels",
    [
        pa.array([1.0, 2, float("nan"), 1, 2, 3]),
        pa.array([1, 2, None, 1, 2, 3]),
        pa.array(["a", "b", None, "a", "b", "c"]),
        pa.array(["a", "b", "", "a", "b", "c"]),
        dictionary(["a", "b", None, "a", "b", "c"]),
    ],
    ids=lambda labels: str(labels.type),
)
def test_missing_labels_are_missing(tmp_path: Path, labels: pa.Array) -> None:
    assert refusal(of_columns, tmp_path, path=PATHS, label=labels).endswith("row 3 has no label")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"path": PATHS, "label": [["a"]] * 6}, "column label is of type list<"),
        ({"path": [["a"]] * 6, "label": LABELS}, "column path is of type list<"),
        ({"path": PATHS, "label": [{"id": 3}] * 6}, "column label is of type struct<"),
        ({"path": PATHS, "label": [b"\xff"] * 6}, "column label is of type binary, and rows 1 to 6 are no texts"),
        ({"path": PATHS, "label": pa.nulls(6)}, "row 1 has no label"),
    ],
)
def test_columns_that_are_no_texts(tmp_path: Path, columns: dict, message: str) -> None:
    assert message in refusal(of_columns, tmp_path, **columns)


@pytest.mark.parametrize(
    ("labels", "classes", "note"),
    [
        (["c0", "c0 ", "\tc0", "c1", "c1", "c1"], ("c0", "c1"), "are one class: 'c0' and 'c0 ' and '\\tc0'"),
        (["3", "3.0", "3.00", "4", "4", "4.5"], ("3", "4", "4.5"), "are one class: '3' and '3.0' and '3.00'"),
        (["é", "e\u0301", "é", "b", "b", "b"], ("b", "é"), "are one class: 'é' and 'e\u0301'"),
        (["Cat", "cat", "CAT", "b", "b", "b"], ("CAT", "Cat", "b", "cat"), "classes: 'Cat' and 'cat' and 'CAT'"),
        (["03", "3", "3", "b", "b", "b"], ("3", "b", "03"), "different classes: '03' and '3'"),
        (["red car", "red  car", "b", "b", "b", "b"], ("b", "red  car", "red car"), "different classes: 'red car' and"),
        (["None", "a", "a", "b", "b", "b"], ("None", "a", "b"), "label 'None' is a class of its own; if it means that"),
    ],
)  # fmt: skip
def test_labels_that_are_nearly_the_same_are_named(
    tmp_path: Path, labels: list[str], classes: tuple[str, ...], note: str
) -> None:
    lines = "".join(f'{path},"{label}"\n' for path, label in zip(PATHS, labels, strict=True))
    collection = read("path,label\n" + lines, tmp_path)
    assert set(collection.images.class_names) == set(classes)
    assert len(collection.notes) == 1 and note in collection.notes[0]


def test_long_numbers_are_not_taken_for_each_other(tmp_path: Path) -> None:
    labels = ["12345678901234567", "12345678901234568"] * 3
    lines = "".join(f"{path},{label}\n" for path, label in zip(PATHS, labels, strict=True))
    collection = read("path,label\n" + lines, tmp_path)
    assert len(collection.images.class_names) == 2 and collection.notes == ()


def test_form_of_open_metric_learning(tmp_path: Path) -> None:
    """Its validation is what is tested at the end; a picture may be query and gallery."""
    rows = ["label,path,split,is_query,is_gallery,category", *(f"a,a/{number}.png,train,,," for number in range(3))]
    rows += ["b,b/0.png,validation,True,False,", "b,b/1.png,validation,False,True,", "b,b/2.png,validation,True,True,"]
    collection = read("\n".join(rows), tmp_path)
    assert collection.test.tolist() == [1] and collection.validation is None
    assert collection.role.tolist() == [NEITHER] * 3 + [QUERY, GALLERY, BOTH]
    columns, split = collection.notes
    assert columns == "columns that are not used: category (label is)" and split.startswith(
        "no class is in the split test"
    )


def test_flags_as_pandas_writes_them(tmp_path: Path) -> None:
    flags = {"is_query": [None, None, None, 1.0, 0.0, 0.0], "is_gallery": [None, None, None, False, True, True]}
    collection = of_columns(tmp_path, path=PATHS, label=LABELS, split=["train"] * 3 + ["TEST "] * 3, **flags)
    assert collection.role.tolist() == [NEITHER] * 3 + [QUERY, GALLERY, GALLERY] and collection.test.tolist() == [1]


def test_pictures_without_a_role_among_others_are_counted(tmp_path: Path) -> None:
    role = ["", "", "", "query", "gallery", ""]
    collection = of_columns(tmp_path, path=PATHS, label=LABELS, split=["train"] * 3 + ["test"] * 3, role=role)
    assert collection.notes[0].startswith("1 pictures of classes to validate or test on are neither query nor gallery")


def test_columns_that_seem_to_say_something_are_named(tmp_path: Path) -> None:
    more = {"fold": [0] * 6, "is_test": [False] * 6, "category": ["x"] * 6, "camera_id": [1] * 6, "price": [2.5] * 6}
    (note,) = of_columns(tmp_path, path=PATHS, label=LABELS, **more).notes
    assert note == (
        "columns that are not used: fold (if it says the split, rename it to split), is_test (if it says the split, "
        "rename it to split), category (label is), camera_id (if it says the camera, rename it to camera)"
    )


@pytest.mark.parametrize("column", ["camera", "sequence"])
def test_cameras(tmp_path: Path, column: str) -> None:
    collection = of_columns(tmp_path, path=PATHS, label=LABELS, **{column: ["c2", "c1", None, "c2 ", "c1", "c10"]})
    assert collection.images.cameras.tolist() == [2, 0, -1, 2, 0, 1] and collection.images.cameras.dtype == np.int64
    numbers = of_columns(tmp_path, path=PATHS, label=LABELS, **{column: [1, 2, None, 1, 2, 2]})
    assert numbers.images.cameras.tolist() == [0, 1, -1, 0, 1, 1]
    assert read(PLAIN, tmp_path).images.cameras is None


def test_rows_are_left_out_by_patterns(tmp_path: Path) -> None:
    collection = read(PLAIN, tmp_path, exclude=["a", "2.*", "c"])
    assert collection.images.names.tolist() == ["b/0.png", "b/1.png"] and collection.images.class_names == ("b",)
    assert collection.passed_over == {"data.exclude a": 3, "data.exclude 2.*": 1}
    assert collection.notes[1].startswith("data.exclude: c matches no file")
    assert "no row is left (passed over: 6 data.exclude *)" in refusal(read, PLAIN, tmp_path, exclude=["*"])


def test_absolute_paths_below_a_relative_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text(f"path,label\n{tmp_path}/real/a.png,x\n{tmp_path}/link/b.png,y\nlink/c.png,y\n")
    for root in ("link", "./link/", str(tmp_path / "link")):
        assert load_table("t.csv", root).images.names.tolist() == ["a.png", "b.png", "link/c.png"]
    assert load_table("t.csv", None).images.names.tolist() == ["real/a.png", "link/b.png", "link/c.png"]
