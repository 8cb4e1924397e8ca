from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dml_core.data import transforms
from dml_core.data.datasets import LabelledImages, load_folder, load_grocery, split
from dml_core.data.loading import Views


def picture(path: Path, color: tuple[int, int, int] = (200, 20, 20), size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "abcdefghij":
        for number in range(3):
            picture(tmp_path / "set" / name / f"{number} ü.png")
    return tmp_path / "set"


def classes(images: LabelledImages) -> set[str]:
    return set(images.class_names)


@pytest.mark.parametrize("seed", range(5))
def test_splits_share_no_class_and_lose_none(folder: Path, seed: int) -> None:
    images = load_folder(folder)
    made = split(images, np.array([0, 3, 5, 7, 9]), 0.2, seed)
    parts = [classes(made.train), classes(made.validation.query), classes(made.test.query)]
    assert [len(p) for p in parts] == [4, 1, 5] and len(set.union(*parts)) == 10
    assert parts[2] == set("adfhj")
    for part in (made.train, made.validation.query, made.test.query):
        for index in range(len(part)):  # labels still mean the folder that a picture lies in
            assert part.images[index].parent.name == part.class_names[part.labels[index]]


def test_query_mask_divides_validation_and_test_only(folder: Path) -> None:
    images = load_folder(folder)
    queries = np.arange(30) % 3 == 0
    made = split(images, np.arange(5), 0.2, 0, queries)
    assert len(made.train) == 12
    for task in (made.validation, made.test):
        assert task.gallery.class_names == task.query.class_names
        assert all(path.name == "0 ü.png" for path in task.query.images)
        assert not any(path.name == "0 ü.png" for path in task.gallery.images)


def test_parts_know_their_places_in_a_whole_that_no_seed_changes(folder: Path) -> None:
    images = load_folder(folder)
    queries = np.arange(len(images)) % 2 == 0
    digests = set()
    for seed, limit in ((0, None), (1, None), (0, 5)):
        parts = split(images, np.array([0, 2]), 0.5, seed, queries, limit)
        wholes = {id(part.whole) for part in (parts.train, *parts.validation, *parts.test)}
        assert len(wholes) == 1
        for part in (parts.train, *parts.validation, *parts.test):
            assert [part.whole.images[i] for i in part.places] == part.images
            names = [part.whole.class_names[c] for c in part.whole.labels[part.places]]
            assert names == [part.class_names[c] for c in part.labels]
        digests.add(parts.train.whole.digest())
    assert len(digests) == 2 and images.digest() in digests


def test_limit_and_too_few_classes(folder: Path) -> None:
    images = load_folder(folder)
    made = split(images, np.arange(5), 0.34, 0, limit_classes=3)
    assert [len(x.class_names) for x in (made.train, made.validation.query, made.test.query)] == [2, 1, 3]
    assert split(images, np.arange(5), 0.0, 0).validation is None
    with pytest.raises(ValueError, match="10 classes give 1 to train, 1 to validate and 8 to test on"):
        split(images, np.arange(8), 0.2, 0)


def test_folder_errors_name_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.root=.*nowhere: no such folder"):
        load_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no class folders"):
        load_folder(tmp_path / "empty")
    (folder / "k").mkdir()
    (folder / "l").mkdir()
    with pytest.raises(ValueError, match="class folders without a picture: k, l"):
        load_folder(folder)


def test_pictures_of_all_kinds_become_rgb(tmp_path: Path) -> None:
    files = {
        "gray.png": Image.new("L", (9, 7)),
        "palette.gif": Image.new("P", (9, 7)),
        "alpha.png": Image.new("RGBA", (9, 7)),
        "cmyk.jpg": Image.new("CMYK", (9, 7)),
    }
    for name, image in files.items():
        image.save(tmp_path / name)
        images = LabelledImages([tmp_path / name], np.zeros(1, np.int64), ("a",))
        assert images.picture(0, 8).shape == (3, 7, 9) and images.picture(0, 8).dtype == torch.uint8


def test_rotated_and_large_jpegs(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (800, 400)).save(tmp_path / "a.jpg", exif=exif)
    images = LabelledImages([tmp_path / "a.jpg"], np.zeros(1, np.int64), ("a",))
    assert images.picture(0, 100).shape == (3, 200, 100)  # upright, and decoded at a quarter of its size


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n torn"])
def test_unreadable_picture_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    images = LabelledImages([tmp_path / "bad.png"], np.zeros(1, np.int64), ("a",))
    with pytest.raises(ValueError, match=r"unreadable picture .*bad\.png"):
        images.picture(0, 32)


def test_digest_tells_sets_apart(folder: Path) -> None:
    images = load_folder(folder)
    assert images.digest() == load_folder(folder).digest()
    picture(folder / "a" / "0 ü.png", (0, 0, 0), (41, 30))
    assert images.digest() != load_folder(folder).rows(np.arange(30)).rows(np.arange(29)).digest()
    assert images.digest() != images.rows(np.arange(1, 30)).digest()


def test_grocery_layout(shared: Path) -> None:
    images, queries = load_grocery(shared / "data" / "GroceryStoreDataset")
    assert len(images) == 5421 and len(images.class_names) == 81 and images.class_names[0] == "Golden-Delicious"
    made = split(images, np.arange(1, 81, 2), 0.2, 0, queries)
    assert [len(s.class_names) for s in (made.train, made.validation.query, made.test.query)] == [33, 8, 40]
    assert all("/test/" in str(path) for path in made.test.query.images)
    assert not any("/test/" in str(path) for path in made.test.gallery.images)
    assert made.test.query.picture(0, 144).shape[0] == 3


def test_grocery_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not the Grocery Store Dataset, there is no .*classes\.csv"):
        load_grocery(tmp_path)


@pytest.mark.parametrize("name", ["crop", "shift", "none"])
def test_views_are_a_function_of_sample_and_seed(folder: Path, name: str) -> None:
    images = load_folder(folder)
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(images.images[0])
    views = Views(images, 16, transforms.evaluation(16), transforms.training(name, 16))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, other = views[0, 5], views[0, 6]
    assert (torch.get_rng_state() == before).all()
    torch.rand(3)
    assert (views[0, 5] == one).all() and one.shape == (3, 16, 16) and one.dtype == torch.uint8
    assert (one == other).all() == (name == "none")


@pytest.mark.parametrize("processes", [0, 2])
def test_batches_come_in_order(folder: Path, processes: int) -> None:
    images = load_folder(folder)
    views = Views(images, 16, transforms.evaluation(16), transforms.training("crop", 16))
    rows = [[(0, None), (4, 3)], [(2, 9)], [(7, 1), (8, 2), (9, 4)]]
    batches = list(views.batches(rows, processes))
    assert [len(b) for b in batches] == [2, 1, 3]
    assert (batches[2][1] == views[8, 2]).all()
