"""Each published archive's layout, small and at full size; the Grocery Store Dataset for real."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dml_core.data.benchmarks import BENCHMARKS, count_parts
from dml_core.data.datasets import GALLERY, QUERY, split


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def spread(images: int, classes: int) -> list[int]:
    """A class for each image, as evenly as it goes."""
    return sorted(i % classes for i in range(images))


def make_cub(root: Path, train=(5864, 100), test=(5924, 100)) -> None:
    labels = [c + 1 for c in spread(*train)] + [c + 101 for c in spread(*test)]
    top = root / "CUB_200_2011"
    write(top / "image_class_labels.txt", [f"{i + 1} {c}" for i, c in enumerate(labels)])
    write(top / "images.txt", [f"{i + 1} {c:03d}.Bird_{c}/Bird_{i:04d}.jpg" for i, c in enumerate(labels)])


def make_sop(root: Path, train=(59551, 11318), test=(60502, 11316)) -> None:
    first, number = 1, 1
    for part, (images, classes) in {"train": train, "test": test}.items():
        rows = ["image_id class_id super_class_id path"]
        for c in spread(images, classes):
            rows.append(f"{number} {first + c} 1 bicycle_final/{first + c:012d}_{number}.JPG")
            number += 1
        write(root / "Stanford_Online_Products" / f"Ebay_{part}.txt", rows)
        first += classes


def car_labels(train=(8054, 98), test=(8131, 98)) -> list[int]:
    return [c + 1 for c in spread(*train)] + [c + 99 for c in spread(*test)]


def make_cars_matrix(root: Path) -> None:
    from scipy.io import savemat

    labels = car_labels()
    fields = [("relative_im_path", object), ("bbox_x1", float), ("class", np.uint8), ("test", np.uint8)]
    rows = [(f"car_ims/{i + 1:06d}.jpg", 1.0, c, i % 2) for i, c in enumerate(labels)]
    names = np.array([f"Car {c:03d} S/C 2012" for c in range(1, 197)], dtype=object)
    root.mkdir(parents=True)
    savemat(root / "cars_annos.mat", {"annotations": np.array([rows], dtype=fields), "class_names": names[None]})


def make_cars_tables(root: Path) -> None:
    labels = car_labels()
    write(root / "names.csv", [f"Car {c:03d} S/C 2012" for c in range(1, 197)])
    for part, start in (("train", 0), ("test", 1)):
        rows = [f"{i:05d}.jpg,1,2,3,4,{c}" for i, c in enumerate(labels) if i % 2 == start]
        write(root / f"anno_{part}.csv", rows)


def make_cars_tree(root: Path) -> None:
    for i, c in enumerate(car_labels()):
        folder = root / "car_data" / ("train", "test")[i % 2] / f"Car {c:03d} S-C 2012"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:05d}.jpg").touch()


def make_inshop(root: Path, train=(25882, 3997), query=(14218, 3985), gallery=(12612, 3985)) -> None:
    rows, number = [], 0
    for part, (images, classes), first in (("train", train, 1), ("query", query, 4000), ("gallery", gallery, 4000)):
        for c in spread(images, classes):
            item, number = f"id_{first + c:08d}", number + 1
            rows.append(f"img/WOMEN/Dresses/{item}/{number:02d}_1_front.jpg {item} {part}")
    write(root / "Eval" / "list_eval_partition.txt", [str(len(rows)), "image_name item_id evaluation_status", *rows])


def make_vehicleid(root: Path, train=(110178, 13134), sizes=(800, 1600, 2400), images_each=6) -> None:
    lists = root / "VehicleID_V1.0" / "train_test_split"
    write(lists / "train_list.txt", [f"{i:07d} {c + 1}" for i, c in enumerate(spread(*train))])
    for size in sizes:
        cars = [20000 + c for c in range(size) for _ in range(images_each)]
        write(lists / f"test_list_{size}.txt", [f"{1000000 + i:07d} {c}" for i, c in enumerate(cars)])


def make_omniglot(root: Path, background=(964, 30), evaluation=(659, 20), drawn=20) -> None:
    for part, (characters, alphabets) in {"background": background, "evaluation": evaluation}.items():
        for number, alphabet in enumerate(spread(characters, alphabets)):
            folder = root / "omniglot-py" / f"images_{part}" / f"{part}_{alphabet}" / f"character{number:02d}"
            folder.mkdir(parents=True)
            for i in range(drawn):
                (folder / f"{number:04d}_{i:02d}.png").touch()


FULL = {
    "cub": make_cub,
    "sop": make_sop,
    "cars": make_cars_matrix,
    "cars by tables": make_cars_tables,
    "cars by folders": make_cars_tree,
    "inshop": make_inshop,
    "vehicleid": make_vehicleid,
    "omniglot": make_omniglot,
}


@pytest.mark.parametrize("case", FULL)
def test_an_index_of_full_size_has_the_published_counts(case: str, tmp_path: Path) -> None:
    FULL[case](tmp_path / "set")
    benchmark = BENCHMARKS[case.split()[0]]
    collection = benchmark.load(tmp_path / "set")
    numbers = count_parts(split(collection, validation_fraction=0.0))
    assert {key: numbers[key] for key in benchmark.expected} == benchmark.expected
    assert len(set(collection.images.class_names)) == len(collection.images.class_names)


def paint(root: Path, names: list[str]) -> None:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (i % 256, 0, 0)).save(root / name)


SMALL = {
    "cub": lambda root: make_cub(root, (9, 3), (6, 2)),
    "sop": lambda root: make_sop(root, (9, 3), (6, 2)),
    "inshop": lambda root: make_inshop(root, (9, 3), (4, 2), (2, 2)),
    "vehicleid": lambda root: make_vehicleid(root, (9, 3), (2, 3, 4), 3),
    "omniglot": lambda root: make_omniglot(root, (4, 2), (2, 1), 3),
}


@pytest.mark.parametrize("name", SMALL)
def test_pictures_lie_where_the_archive_has_them(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "vehicleid":  # its lists are known by their sizes
        for size, small in ((800, 2), (1600, 3), (2400, 4)):
            make_vehicleid(tmp_path / "set", (9, 3), (small,), 3)
            lists = tmp_path / "set" / "VehicleID_V1.0" / "train_test_split"
            (lists / f"test_list_{small}.txt").rename(lists / f"test_list_{size}.txt")
    else:
        SMALL[name](tmp_path / "set")
    images = BENCHMARKS[name].load(tmp_path / "set").images
    paint(Path(images.files.root), images.images.tolist())
    for index in range(len(images)):
        assert images.picture(index, 8).shape == (3, 10, 12)
    top = {"cub": "CUB_200_2011/images", "sop": "Stanford_Online_Products", "inshop": "img"}
    top |= {"vehicleid": "VehicleID_V1.0/image", "omniglot": "omniglot-py/images_background"}
    assert (tmp_path / "set" / top[name]).is_dir()


def test_roles_lists_and_draws(tmp_path: Path) -> None:
    make_inshop(tmp_path / "a", (9, 3), (4, 2), (2, 2))
    splits = split(BENCHMARKS["inshop"].load(tmp_path / "a"), validation_fraction=0.3)
    assert splits.validation.gallery is None
    assert (len(splits.tests["test"].query), len(splits.tests["test"].gallery)) == (4, 2)
    make_vehicleid(tmp_path / "b")
    collection = BENCHMARKS["vehicleid"].load(tmp_path / "b")
    assert set(split(collection).tests) == {"test", "test_small", "test_medium", "test_large"}
    assert collection.draws == 10 and collection.role is None


def test_the_archives_own_folder_may_be_given(tmp_path: Path) -> None:
    make_cub(tmp_path)
    assert len(BENCHMARKS["cub"].load(tmp_path / "CUB_200_2011").images) == 11788


@pytest.mark.parametrize("name", BENCHMARKS)
def test_what_is_missing_is_named_with_where_to_get_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data.root=.*: not .*, there is no .*; (get it|data.download=true)"
    ) as refusal:
        BENCHMARKS[name].load(tmp_path)
    assert BENCHMARKS[name].source.split(":")[0] in str(refusal.value) and "\n" not in str(refusal.value)


def test_grocery_for_real(shared: Path) -> None:
    collection = BENCHMARKS["grocery"].load(shared / "data" / "GroceryStoreDataset")
    assert len(collection.images) == 5421 and len(collection.images.class_names) == 81
    assert collection.images.class_names[0] == "Golden-Delicious"
    splits = split(collection)
    test = splits.tests["test"]
    assert [len(s.class_names) for s in (splits.train, splits.validation.query, test.query)] == [33, 8, 40]
    assert all(name.startswith("test/") for name in test.query.names)
    assert not any(name.startswith("test/") for name in test.gallery.names)
    assert test.query.picture(0, 144).shape[0] == 3
    assert {QUERY, GALLERY} == set(collection.role.tolist())
    numbers = count_parts(split(collection, validation_fraction=0.0))
    assert {key: numbers[key] for key in BENCHMARKS["grocery"].expected} == BENCHMARKS["grocery"].expected
