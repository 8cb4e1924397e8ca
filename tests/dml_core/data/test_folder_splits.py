"""Trees whose folders are splits, and names that say label, camera and split."""

from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from dml_core.data.datasets import GALLERY, NEITHER, QUERY, Collection, split
from dml_core.data.user_sets import load_folder, pattern_regex

MARKET = r"(?P<label>\d+)_c(?P<camera>\d)"


@pytest.fixture(params=["local", "memory"])
def load(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Collection]]:
    """Load a tree of files with these names."""
    memory = fsspec.filesystem("memory")

    def load(*names: str, **options) -> Collection:
        for name in names:
            if request.param == "memory":
                memory.pipe(f"/bucket/{name}", b"x")
            else:
                (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / "set" / name).write_bytes(b"x")
        return load_folder("memory://bucket" if request.param == "memory" else str(tmp_path / "set"), **options)

    yield load
    if memory.exists("/bucket"):
        memory.rm("/bucket", recursive=True)


def tree(**classes: str) -> list[str]:
    """Names of two pictures of each class: train="abc" gives train/a/0.png, ..."""
    return [f"{top}/{label}/{number}.png" for top, labels in classes.items() for label in labels for number in range(2)]


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Training", "validation", "TEST"), ("train", "valid", "testing")]
)
def test_folders_called_splits_are_splits(load: Callable[..., Collection], names: tuple[str, str, str]) -> None:
    train, validation, test = names
    collection = load(*tree(**{train: "abc", validation: "d", test: "ef"}))
    assert collection.images.class_names == tuple("abcdef") and collection.role is None
    assert collection.test.tolist() == [4, 5] and collection.validation.tolist() == [3]
    listed = ", ".join(sorted(names))
    assert collection.notes == (f"its folders {listed} are taken as the split, and those in them as classes",)
    parts = split(collection)
    assert parts.train.class_names == tuple("abc") and parts.notes == collection.notes


def test_without_a_test_validation_is_tested_on(load: Callable[..., Collection]) -> None:
    collection = load(*tree(train="abc", val="de"))
    assert collection.test.tolist() == [3, 4] and collection.validation is None
    assert any(note.startswith("no class is in the split test") for note in collection.notes)


@pytest.mark.parametrize("above", ["", "test/"])
def test_query_and_gallery(load: Callable[..., Collection], above: str) -> None:
    names = [*tree(train="ab"), *(f"{above}{name}" for name in tree(query="cd", gallery="cde"))]
    collection = load(*names)
    images = collection.images
    assert images.class_names == tuple("abcde") and collection.test.tolist() == [2, 3, 4]
    roles = {"train": NEITHER, "query": QUERY, "gallery": GALLERY}
    of_names = [roles[name.removeprefix(above).split("/")[0]] for name in images.names.tolist()]
    assert collection.role.tolist() == of_names


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (tree(train="abc", val="abc"), r"but class folder 'a' lies in train and in val; .*/train takes that folder"),
        (tree(train="ab", test="c", extra="d"), r"splits, but extra lies beside them; data.exclude=\[extra\]"),
        (tree(train="abc"), r"its only folder train looks like a split; data.root=.*/train takes it"),
        ([*tree(train="ab"), "test/0.png"], r"pictures lie right in them, test/0.png first; expected test/CLASS/"),
    ],
)  # fmt: skip
def test_what_only_looks_like_splits_is_refused(
    load: Callable[..., Collection], names: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        load(*names)
    assert "\n" not in str(refusal.value) and str(refusal.value).startswith("data.root=")


def test_a_class_may_be_called_train(load: Callable[..., Collection]) -> None:
    collection = load("bus/0.png", "train/0.png", "car/x/0.png")
    assert collection.images.class_names == ("bus", "car", "train") and collection.test is None
    assert load(*tree(train="abc"), labelled=False).images.class_names == ("bus", "car", "train")


def test_a_test_alone_is_all_tested(load: Callable[..., Collection]) -> None:
    assert load(*tree(test="abc")).test.tolist() == [0, 1, 2]


def test_pictures_beside_the_classes_of_a_split_are_counted(load: Callable[..., Collection]) -> None:
    collection = load(*tree(train="ab", test="cd"), "train/stray.png", "README.md")
    assert len(collection.images) == 8 and collection.test.tolist() == [2, 3]
    assert collection.passed_over == {"pictures beside the class folders": 1, "files that end with .md": 1}


def test_market_1501(load: Callable[..., Collection]) -> None:
    names = ["bounding_box_train/0002_c1s1_000451_03.jpg", "bounding_box_train/0007_c3s3_077419_03.jpg"]
    names += ["query/0001_c1s1_001051_00.jpg", "query/0003_c2s1_001051_00.jpg"]
    names += ["bounding_box_test/0001_c2s1_001051_00.jpg", "bounding_box_test/0003_c2s2_001051_00.jpg"]
    names += ["bounding_box_test/-1_c2s1_001051_00.jpg", "bounding_box_test/0000_c6s1_001051_00.jpg"]
    names += ["gt_bbox/0001_c1s1_001051_00.jpg", "bounding_box_test/Thumbs.db", "readme.txt"]
    with pytest.raises(ValueError, match=r"gt_bbox lies beside them; data.exclude=\[gt_bbox\] leaves it out"):
        load(*names, pattern=MARKET)
    collection = load(exclude=["gt_*", "-1_*"], pattern=MARKET)
    images = collection.images
    assert images.class_names == ("0000", "0001", "0002", "0003", "0007") and collection.test.tolist() == [0, 1, 3]
    facts = zip(images.names.tolist(), collection.role.tolist(), images.cameras.tolist(), strict=True)
    expected = {"0000_c6": (GALLERY, 3), "0001_c2": (GALLERY, 1), "0003_c2s2": (GALLERY, 1), "0001_c1": (QUERY, 0)}
    expected |= {"0003_c2s1": (QUERY, 1), "0002_c1": (NEITHER, 0), "0007_c3": (NEITHER, 2)}
    for name, role, camera in facts:
        (key,) = [key for key in expected if name.split("/")[1].startswith(key)]
        assert (role, camera) == expected[key]
    assert collection.passed_over["data.exclude -1_*"] == 1 and collection.passed_over["data.exclude gt_*"] == 1
    assert len(split(collection, validation_fraction=0).tests["test"].query) == 2


def test_labels_in_the_names_of_a_flat_folder(load: Callable[..., Collection]) -> None:
    names = ["10-a.png", "9-a.png", "deep/9-b.png", "other.png"]
    collection = load(*names, pattern=r"(^|/)(?P<label>\d+)-")
    assert collection.images.class_names == ("9", "10") and collection.images.labels.tolist() == [1, 0, 0]
    assert collection.notes == ("passed over: 1 names without a match of data.pattern",)


def test_a_camera_in_the_names_of_class_folders(load: Callable[..., Collection]) -> None:
    collection = load("a/c2_0.png", "a/1.png", "b/c1_0.png", pattern=r"(c(?P<camera>\d)_)?\d\.png$")
    assert collection.images.class_names == ("a", "b") and collection.images.cameras.tolist() == [-1, 1, 0]


def test_split_and_role_in_names(load: Callable[..., Collection]) -> None:
    names = ["a/train_1.png", "b/train_1.png", "c/test_query_1.png", "c/test_gallery_2.png"]
    collection = load(*names, pattern=r"/(?P<split>train|test)_((?P<role>query|gallery)_)?")
    assert collection.test.tolist() == [2] and collection.role.tolist() == [NEITHER, NEITHER, GALLERY, QUERY]
    with pytest.raises(ValueError, match=r"data.root=.*: class folder 'a' is in two splits \(train and test\)"):
        load("a/test_gallery_3.png", pattern=r"/(?P<split>train|test)")
    with pytest.raises(ValueError, match=r"split '3' is not one of train, "):
        load(pattern=r"(?P<split>\d)")


def test_no_name_matches(load: Callable[..., Collection]) -> None:
    with pytest.raises(
        ValueError, match=r"no picture with a label in it; data.pattern=x(.*) is searched .*2 names without"
    ):
        load(*tree(a="b"), pattern=r"x(?P<label>y)")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(?P<label>", r"not a regular expression \(missing \), unterminated subpattern at position 0\)"),
        (r"\d+", r"it has no named group; allowed: \(\?P<label>...\), "),
        (r"(?P<id>\d+)", r"the group id has no meaning; allowed: \(\?P<label>...\), "),
        (r"(?P<camera>\d)(?P<sequence>\d)", "camera and sequence mean the same here"),
    ],
)
def test_patterns_that_say_nothing_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pattern_regex(pattern)


def test_cameras_reach_the_tasks(load: Callable[..., Collection]) -> None:
    names = [f"{top}/{label}_c{number}.jpg" for top, labels in (("train", "abc"), ("test", "de")) for label in labels
             for number in range(3)]  # fmt: skip
    parts = split(load(*names, pattern=r"(?P<label>[a-e])_c(?P<camera>\d)"))
    assert np.array_equal(parts.tests["test"].query.cameras, [0, 1, 2, 0, 1, 2])


def test_a_folder_above_the_class_folders_names_them(load: Callable[..., Collection]) -> None:
    with pytest.raises(ValueError, match=r"only class folder images has 2 folders in it; data.root=.*/images takes"):
        load(*tree(images="ab"), "README.md")
