"""Batches of views: in the order of the plan, the same whoever makes them, and one ahead on their way to a device."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dml_core.data.datasets import LabelledImages
from dml_core.data.loading import Views, one_ahead, send, sent_ahead
from dml_core.data.pictures import BadPicture
from dml_core.data.sampling import Rows
from dml_core.data.user_sets import load_folder

SIZE = 16
ROWS: list[Rows] = [[(0, 8), (4, 3)], [(2, 9)], [(7, 1), (7, 2), (9, 4)]]


@pytest.fixture
def images(tmp_path: Path) -> LabelledImages:
    """Ten files of noise in five classes."""
    rng = np.random.default_rng(0)
    for number in range(10):
        path = tmp_path / f"class {number // 2}" / f"{number} ü.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 30, 3), np.uint8)).save(path)
    return load_folder(str(tmp_path)).images


@pytest.fixture
def embedded() -> LabelledImages:
    """Ten gray pictures in memory, the size of views."""
    pixels = np.random.default_rng(0).integers(0, 255, (10, SIZE, SIZE), np.uint8)
    return LabelledImages(pixels, np.arange(10) // 2, tuple("abcde"))


def without_seeds(rows: Rows) -> Rows:
    return [(sample, None) for sample, _ in rows]


def test_all_bad_pictures_of_a_batch_are_named(images: LabelledImages) -> None:
    for sample in (0, 5):
        Path(images.files.root, images.entry(sample)).write_bytes(b"no picture")
    for seed in (None, 1):
        with pytest.raises(BadPicture, match=r"class 0/0 ü.png: not a picture; class 2/5 ü.png: not a picture"):
            Views(images, SIZE, "crop").batch([(sample, seed) for sample in range(10)])


@pytest.mark.parametrize("name", ["crop", "shift", "none"])
def test_views_are_a_function_of_sample_and_seed(images: LabelledImages, name: str) -> None:
    views = Views(images, SIZE, name)
    before = torch.get_rng_state()
    one, other, again = views.batch([(0, 5), (0, 6), (0, 5)])
    assert torch.equal(torch.get_rng_state(), before)
    assert one.shape == (3, SIZE, SIZE) and one.dtype == torch.uint8
    assert torch.equal(one, again) and torch.equal(one, other) == (name == "none")
    assert torch.equal(views.batch([(0, 5)])[0], one)
    assert torch.equal(views.batch([(0, None)]), Views(images, SIZE).batch([(0, 7)]))


def test_half_of_the_crops_are_mirrored(images: LabelledImages) -> None:
    """Of a picture that is dark on its left side."""
    Image.fromarray(np.tile(np.arange(0, 200, 5, np.uint8), (40, 1))).save(Path(images.files.root, images.entry(0)))
    crops = Views(images, SIZE, "crop").batch([(0, seed) for seed in range(400)]).float()
    mirrored = (crops[..., 0].mean((1, 2)) > crops[..., -1].mean((1, 2))).float().mean()
    assert 0.42 < mirrored < 0.58


@pytest.mark.parametrize("name", ["crop", "shift"])
@pytest.mark.parametrize("processes", [0, 2])
def test_batches_come_in_order(images: LabelledImages, name: str, processes: int) -> None:
    views = Views(images, SIZE, name)
    batches = list(views.batches(ROWS, processes))
    assert len(batches) == len(ROWS)
    for batch, rows in zip(batches, ROWS, strict=True):
        assert batch.shape == (len(rows), 3, SIZE, SIZE)
        for view, row in zip(batch, rows, strict=True):
            assert torch.equal(view, views.batch([row])[0])


@pytest.mark.parametrize("name", ["shift", "none"])
def test_embedded_pictures_have_the_same_views_all_at_once_and_one_by_one(embedded: LabelledImages, name: str) -> None:
    resident = torch.from_numpy(embedded.images)
    for part in (embedded, embedded.select(np.arange(10)[::-1])):
        together, single = Views(part, SIZE, name, resident), Views(part, SIZE, name)
        for rows in (*ROWS, *map(without_seeds, ROWS)):
            assert torch.equal(together.batch(rows), single.batch(rows))
        for batch, expected in zip(together.batches(ROWS, 2), single.batches(ROWS), strict=True):
            assert torch.equal(batch, expected)


def test_one_ahead_has_taken_the_next_item() -> None:
    taken = list[int]()
    items = one_ahead(taken.append(number) or number for number in range(3))
    assert [(item, len(taken)) for item in items] == [(0, 2), (1, 3), (2, 3)]
    assert list(one_ahead([])) == []


def test_a_processor_is_sent_what_is_there() -> None:
    batches = [torch.ones(2), torch.zeros(3)]
    sent = sent_ahead(batches, torch.device("cpu"))
    assert all(one is other for one, other in zip(sent, batches, strict=True))
    assert send(batches[0], torch.device("cpu")) is batches[0]
