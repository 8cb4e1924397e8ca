from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dml_core.data.datasets import BOTH, GALLERY, NEITHER, QUERY, Collection, LabelledImages, split
from dml_core.data.sampling import one_of_each_class
from dml_core.data.user_sets import load_folder


def picture(path: Path, color: tuple[int, int, int] = (200, 20, 20), size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "abcdefghij":
        for number in range(3):
            picture(tmp_path / "set" / name / f"{number} ü.png")
    return tmp_path / "set"


@pytest.fixture
def whole(folder: Path) -> Collection:
    """Ten classes of three pictures."""
    return load_folder(str(folder))


def with_test(whole: Collection, *classes: int, **more) -> Collection:
    return Collection(whole.images, np.array(classes), **more)


def classes(images: LabelledImages) -> set[str]:
    return set(images.class_names)


@pytest.mark.parametrize("seed", range(5))
def test_splits_share_no_class_and_lose_none(whole: Collection, seed: int) -> None:
    splits = split(with_test(whole, 0, 3, 5, 7, 9), seed=seed)
    test = splits.tests["test"].query
    parts = [classes(splits.train), classes(splits.validation.query), classes(test)]
    assert [len(p) for p in parts] == [4, 1, 5] and len(set.union(*parts)) == 10
    assert parts[2] == set("adfhj")
    for part in (splits.train, splits.validation.query, test):
        for index in range(len(part)):  # labels still mean the folder that a picture lies in
            assert part.entry(index).split("/")[0] == part.class_names[part.labels[index]]


def test_a_share_is_drawn_by_seed(whole: Collection) -> None:
    drawn = [frozenset(classes(split(whole, 0.3, seed=seed).tests["test"].query)) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1 and {len(d) for d in drawn} == {3}


def test_folds_take_turns(whole: Collection) -> None:
    splits = [split(with_test(whole, 8, 9), seed=3, fold=(i, 4)) for i in range(4)]
    validated = [classes(m.validation.query) for m in splits]
    assert sorted(name for part in validated for name in part) == list("abcdefgh")
    assert all(classes(m.train) == set("abcdefgh") - part for m, part in zip(splits, validated, strict=True))


def test_named_validation_classes(whole: Collection) -> None:
    splits = split(with_test(whole, 0, 1, validation=np.array([4, 5])))
    assert classes(splits.validation.query) == {"e", "f"} and classes(splits.train) == set("cdghij")


def test_roles_divide_validation_and_test_only(whole: Collection) -> None:
    role = np.where(np.arange(30) % 3 == 0, QUERY, GALLERY)
    splits = split(with_test(whole, *range(5), role=role))
    assert len(splits.train) == 12
    for task in (splits.validation, splits.tests["test"]):
        assert task.gallery.class_names == task.query.class_names
        assert all(name.endswith("/0 ü.png") for name in task.query.names)
        assert not any(name.endswith("/0 ü.png") for name in task.gallery.names)


def test_classes_without_queries_are_retrieved_among_themselves(whole: Collection) -> None:
    role = np.where(np.arange(30) < 15, np.where(np.arange(30) % 3 == 0, QUERY, GALLERY), NEITHER)
    splits = split(with_test(whole, *range(5), role=role))
    assert splits.tests["test"].gallery is not None and splits.validation.gallery is None


def test_further_lists_and_draws(whole: Collection) -> None:
    splits = split(with_test(whole, *range(5), lists={"small": np.array([1, 3])}, draws=10))
    assert set(splits.tests) == {"test", "test_small"}
    assert classes(splits.tests["test_small"].query) == {"b", "d"}
    assert {task.draws for task in splits.tests.values()} == {10} and splits.validation.draws == 0
    labels = splits.tests["test"].query.labels
    masks = [one_of_each_class(labels, seed) for seed in range(10)]
    assert all(sorted(labels[mask]) == [0, 1, 2, 3, 4] for mask in masks)
    assert len({tuple(mask) for mask in masks}) > 3


def test_what_cannot_be_read_is_left_out_with_classes_that_are_then_empty(whole: Collection) -> None:
    bad = np.zeros(30, bool)
    bad[[0, 3, 4, 5]] = True  # one of class a, all of class b
    lists = {"small": np.array([1, 2])}
    kept = with_test(whole, 0, 1, 2, role=np.arange(30) % 3, lists=lists).without(bad)
    assert kept.images.class_names == tuple("acdefghij") and len(kept.images) == 26
    assert kept.test.tolist() == [0, 1] and kept.lists["small"].tolist() == [1]
    assert kept.role.tolist() == np.arange(30)[~bad].__mod__(3).tolist()
    assert all(name[0] == kept.images.class_names[c] for name, c in zip(kept.images.images, kept.images.labels))
    with pytest.raises(ValueError, match="no picture of the set can be read"):
        whole.without(np.ones(30, bool))


def test_parts_know_their_places_in_a_whole_that_no_seed_changes(whole: Collection) -> None:
    role = np.where(np.arange(30) % 2 == 0, QUERY, GALLERY)
    digests = set()
    for seed, limit in ((0, None), (1, None), (0, 5)):
        parts = split(with_test(whole, 0, 2, role=role), 0.5, 0.5, seed, limit_classes=limit)
        everyone = [parts.train, *parts.validation[:2], *parts.tests["test"][:2]]
        assert len({id(part.whole) for part in everyone}) == 1
        for part in everyone:
            assert (part.whole.images[part.places] == part.names).all() and part.images is part.whole.images
            names = [part.whole.class_names[c] for c in part.whole.labels[part.places]]
            assert names == [part.class_names[c] for c in part.labels]
        digests.add(parts.train.whole.digest())
    assert len(digests) == 2 and whole.images.digest() in digests


def test_cameras_go_with_their_samples(whole: Collection) -> None:
    images = replace(whole.images, cameras=np.arange(30) - 1)
    parts = split(Collection(images, np.array([3, 4])), limit_classes=4)
    for part in (parts.train, parts.tests["test"].query):
        assert (part.cameras == np.array([images.images.tolist().index(name) for name in part.names]) - 1).all()


def test_limit_and_too_few_classes(whole: Collection) -> None:
    five = with_test(whole, *range(5))
    splits = split(five, validation_fraction=0.34, limit_classes=3)
    parts = [splits.train, splits.validation.query, splits.tests["test"].query]
    assert [len(x.class_names) for x in parts] == [2, 1, 3]
    assert split(five, validation_fraction=0.0).validation is None
    with pytest.raises(ValueError, match="10 classes give 1 to train, 1 to validate and 8 to test on"):
        split(with_test(whole, *range(8)))


def test_digest_tells_sets_apart(folder: Path, whole: Collection) -> None:
    images = whole.images
    assert images.digest() == load_folder(str(folder)).images.digest()
    assert images.digest() != images.select(np.arange(1, 30)).digest()


def test_a_sample_may_be_query_and_gallery(whole: Collection) -> None:
    role = np.array([BOTH, QUERY, GALLERY] * 10)
    splits = split(with_test(whole, *range(5), role=role))
    for task in (splits.validation, splits.tests["test"]):
        assert len(task.query) == len(task.gallery) == 2 * len(task.query.class_names)
        names = task.gallery.names.tolist()
        expected = [names.index(name) if name in names else -1 for name in task.query.names.tolist()]
        assert task.query_positions().tolist() == expected and expected.count(-1) == len(expected) // 2
    apart = split(with_test(whole, *range(5), role=np.where(role == BOTH, QUERY, role))).tests["test"]
    assert (apart.query_positions() == -1).all()


def test_where_all_are_query_and_gallery_there_is_no_gallery_of_its_own(whole: Collection) -> None:
    splits = split(with_test(whole, *range(5), role=np.full(30, BOTH)))
    assert splits.tests["test"].gallery is None and len(splits.tests["test"].query) == 15


def test_queries_without_a_gallery_are_refused(whole: Collection) -> None:
    with pytest.raises(ValueError, match="15 pictures have the role query and none the role gallery"):
        split(with_test(whole, *range(5), role=np.full(30, QUERY)))


def test_a_test_asks_for_no_training_classes(whole: Collection) -> None:
    everything = with_test(whole, *range(10))
    with pytest.raises(ValueError, match="at least 2 to train"):
        split(everything)
    splits = split(everything, trains=False)
    assert splits.validation is None and len(splits.train) == 0 and len(splits.tests["test"].query) == 30
    with pytest.raises(ValueError, match="none of the 10 classes is one to test on"):
        split(with_test(whole), trains=False)
