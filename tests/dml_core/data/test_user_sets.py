"""Folders and tables as people have them, on disk and behind HTTP."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from dml_core.data import files
from dml_core.data.datasets import GALLERY, NEITHER, QUERY, split
from dml_core.data.pictures import BadPicture
from dml_core.data.user_sets import load_folder, load_table


def picture(path: Path, color: tuple[int, int, int] = (9, 9, 9)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), color).save(path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a", "b ü", "c" * 200, "d"):
        for number in range(2):
            picture(tmp_path / "set" / name / "deep er" / f"{number} é.png", (number, 0, 0))
    return tmp_path / "set"


def test_folder_errors_name_what_is_wrong(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.root=.*nowhere: no such folder"):
        load_folder(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no class folders"):
        load_folder(str(tmp_path / "empty"))
    (tree / "x").mkdir()
    (tree / "y").mkdir()
    with pytest.raises(ValueError, match="without a picture: x, y"):
        load_folder(str(tree))


def test_names_with_spaces_and_letters_of_all_kinds(tree: Path) -> None:
    images = load_folder(str(tree)).images
    assert images.class_names == ("a", "b ü", "c" * 200, "d") and len(images) == 8
    assert images.images[2] == "b ü/deep er/0 é.png" and images.picture(3, 8)[0, 0, 0] == 1


def test_pictures_without_labels_are_of_a_class_without_a_name(tree: Path, tmp_path: Path) -> None:
    picture(tmp_path / "flat" / "1.png")
    (tmp_path / "flat" / "notes.txt").write_text("")
    flat = load_folder(str(tmp_path / "flat"), labelled=False).images
    assert flat.names.tolist() == ["1.png"] and flat.class_names == ("",)
    picture(tree / "b.png")
    (tree / "x").mkdir()
    images = load_folder(str(tree), labelled=False).images
    assert images.class_names == ("", "a", "b ü", "c" * 200, "d") and len(images) == 9
    assert [images.class_names[label] for label in images.labels[images.names == "b.png"]] == [""]
    assert len(load_folder(str(tmp_path / "flat" / ".."), labelled=False).images) == 10
    with pytest.raises(ValueError, match="no pictures in it"):
        load_folder(str(tree / "x"), labelled=False)


def test_links_out_of_the_root_are_refused_unless_allowed(tree: Path, tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere" / "secret.png")
    (tree / "a" / "inside.png").symlink_to(tree / "d" / "deep er" / "0 é.png")
    (tree / "a" / "circle").symlink_to(tree / "a")
    assert len(load_folder(str(tree)).images) == 9
    (tree / "a" / "out.png").symlink_to(tmp_path / "elsewhere" / "secret.png")
    (tree / "e").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"2 symbolic links lead out of it, .*a/out.png first; data.links=true"):
        load_folder(str(tree))
    allowed = load_folder(str(tree), links=True).images
    assert len(allowed) == 11 and allowed.class_names[-1] == "e" and allowed.picture(10, 8).shape == (3, 20, 20)


def table_of(tree: Path, **columns) -> pd.DataFrame:
    paths = sorted(str(p.relative_to(tree)) for p in tree.rglob("*.png"))
    return pd.DataFrame({"path": paths, "label": [p.split("/")[0] for p in paths], **columns})


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_table_is_the_tree(tree: Path, kind: str) -> None:
    table = table_of(tree).sample(frac=1, random_state=0)
    path = tree / f"t.{kind}"
    table.to_csv(path, index=False) if kind == "csv" else table.to_parquet(path)
    collection = load_table(str(path), None)
    images = collection.images
    assert (
        set(images.class_names) == {"a", "b ü", "c" * 200, "d"} and collection.test is None and collection.role is None
    )
    assert images.images.tolist() == table["path"].tolist()
    assert [images.class_names[c] for c in images.labels] == table["label"].tolist()
    assert images.picture(0, 8).shape == (3, 20, 20)


def test_table_without_labels(tree: Path) -> None:
    table = table_of(tree, split="any")  # is not looked at
    table.drop(columns="label").to_csv(tree / "paths.csv", index=False)
    images = load_table(str(tree / "paths.csv"), None, labelled=False).images
    assert images.names.tolist() == table["path"].tolist() and images.class_names == ("",)
    table.loc[2:4, "label"] = None
    table.to_parquet(tree / "some.parquet")
    images = load_table(str(tree / "some.parquet"), None, labelled=False).images
    assert [images.class_names[label] for label in images.labels] == table["label"].fillna("").tolist()


def test_columns_split_and_role(tree: Path) -> None:
    split_of = {"a": "train", "b": "val", "c": "train", "d": "test"}
    table = table_of(tree)
    table["split"] = [split_of[label[0]] for label in table["label"]]
    table["role"] = [
        "query" if i % 2 else "gallery" if label[0] in "bd" else None for i, label in enumerate(table["label"])
    ]
    table.to_csv(tree / "t.csv", index=False)
    collection = load_table(str(tree / "t.csv"), str(tree))
    assert collection.test.tolist() == [3] and collection.validation.tolist() == [1]
    assert collection.role.tolist() == [NEITHER, QUERY, GALLERY, QUERY] * 2
    splits = split(collection)
    assert splits.tests["test"].gallery.class_names == ("d",) and len(splits.tests["test"].query) == 1


def test_columns_that_change_their_kind_and_others(tmp_path: Path) -> None:
    """Labels that are numbers for a while, and columns that are none of ours."""
    rows = 400_000
    lines = (f"{i:06d}.jpg,{i % 7 if i < rows - 1 else 'seven'},{i if i < rows - 1 else '1.5 kg'}" for i in range(rows))
    (tmp_path / "t.csv").write_text("path,label,weight\n" + "\n".join(lines))
    assert load_table(str(tmp_path / "t.csv"), None).images.class_names == ("seven", *"0123456")


def test_numbers_as_labels_are_in_their_order(tree: Path) -> None:
    table = table_of(tree, label=[10, 10, 9, 9, 100, 100, 2, 2])
    table.to_parquet(tree / "t.parquet")
    assert load_table(str(tree / "t.parquet"), None).images.class_names == ("2", "9", "10", "100")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": None}, "row 1 has no label"),
        ({"path": "../../etc/x.png"}, "1 paths lead out of the root, '../../etc/x.png' first"),
        ({"path": "/etc/x.png"}, "lead out of the root"),
        ({"path": "a/deep er/1 é.png"}, "the path 'a/deep er/1 é.png' comes more than once"),
        ({"split": "tets"}, "split 'tets' is not one of train, .*test, testing, .*or empty"),
        ({"split": "test"}, "label 'a' is in two splits"),
        ({"role": "probe"}, "role 'probe' is not one of query, gallery, query.gallery, or empty"),
    ],
)
def test_rows_at_fault_are_named(tree: Path, change: dict, message: str) -> None:
    table = table_of(tree, split="", role="")
    for column, value in change.items():
        table.loc[0, column] = value
    table.to_csv(tree / "t.csv", index=False)
    with pytest.raises(ValueError, match=f"data.table=.*t.csv: .*{message}"):
        load_table(str(tree / "t.csv"), None)


def test_tables_that_are_none(tree: Path) -> None:
    for content, message in (
        ("", "cannot be read"),
        ("path,label\n", "no rows"),
        ("file,label\na,b\n", "no column path"),
    ):
        (tree / "t.csv").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_table(str(tree / "t.csv"), None)
    (tree / "t.parquet").write_bytes(b"PAR1 no")
    for name, message in (("t.parquet", "cannot be read"), ("none.csv", "cannot be read"), ("t.xlsx", "not a .csv")):
        with pytest.raises(ValueError, match=message):
            load_table(str(tree / name), None)


def test_a_link_in_a_table_is_refused_when_it_is_read(tree: Path, tmp_path: Path) -> None:
    picture(tmp_path / "secret.png")
    (tree / "a" / "out.png").symlink_to(tmp_path / "secret.png")
    table_of(tree).to_csv(tree / "t.csv", index=False)
    place = load_table(str(tree / "t.csv"), None).images.images.tolist().index("a/out.png")
    with pytest.raises(BadPicture, match=r"a/out.png: a link out of data.root"):
        load_table(str(tree / "t.csv"), None).images.picture(place, 8)
    assert load_table(str(tree / "t.csv"), None, links=True).images.picture(place, 8).shape == (3, 20, 20)


LARGE = """
import resource, sys, time
from dml_core.data.user_sets import load_table
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
images = load_table(sys.argv[1], None).images
assert len(images) == int(sys.argv[2]) and images.images[-1].startswith("class_")
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before / 1024)
"""


def test_a_million_rows_take_seconds(tmp_path: Path) -> None:
    rows = 1_000_000
    lines = (f"class_{i % 20_000}/picture_{i:08d}.jpg,{i % 20_000}" for i in range(rows))
    (tmp_path / "t.csv").write_text("path,label\n" + "\n".join(lines))
    command = [sys.executable, "-c", LARGE, str(tmp_path / "t.csv"), str(rows)]
    seconds, megabytes = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert seconds < 20 and megabytes < 400


def test_pictures_over_http(tree: Path, web, monkeypatch: pytest.MonkeyPatch) -> None:
    url, server = web(tree)
    monkeypatch.setattr(files, "FIRST_WAIT", 0.01)
    picture(tree / "plain" / "0.png", (7, 0, 0))
    pd.DataFrame({"path": ["plain/0.png", "plain/1.png"], "label": ["x", "y"]}).to_csv(tree / "t.csv", index=False)
    images = load_table(f"{url}/t.csv", None).images
    assert images.files.root == url and images.picture(0, 8)[0, 0, 0] == 7
    with pytest.raises(BadPicture, match=r"plain/1\.png"):
        images.picture(1, 8)
    server.failures = files.ATTEMPTS - 1
    assert images.picture(0, 8).shape == (3, 20, 20) and server.failures == 0
    server.failures = files.ATTEMPTS
    with pytest.raises(ConnectionError, match=r"plain/0.png: 5 attempts failed"):
        images.picture(0, 8)
    assert server.failures == 0


def test_reading_goes_on_in_a_forked_process(tree: Path, web) -> None:
    """As DataLoader's workers do; an event loop would not survive it."""
    from dml_core.data.loading import Views

    picture(tree / "plain" / "0.png", (7, 0, 0))
    pd.DataFrame({"path": ["plain/0.png"], "label": ["x"]}).to_csv(tree / "t.csv", index=False)
    images = load_table(f"{web(tree)[0]}/t.csv", None).images
    views = Views(images, 8)
    assert views.batch([(0, None)])[0, 0, 0, 0] == 7
    (batch,) = views.batches([[(0, None)] * 3], processes=1)
    assert (batch[:, 0] == 7).all()


def test_unknown_protocols_say_what_is_missing() -> None:
    for url in ("nothing://bucket/t.csv", "s3://bucket/t.csv"):
        with pytest.raises(ValueError, match=f"data.table={url}: cannot be read"):
            load_table(url, None)


def test_folder_in_a_bucket_is_listed(tree: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in tree.rglob("*.png"):
        memory.pipe(f"/bucket/{path.relative_to(tree)}", path.read_bytes())
    there, here = load_folder("memory://bucket").images, load_folder(str(tree)).images
    assert there.images.tolist() == here.images.tolist() and (there.labels == here.labels).all()
    assert (there.picture(5, 8) == here.picture(5, 8)).all()
    memory.rm("/bucket", recursive=True)
