"""The field's benchmark sets, in the layout of their published archives, with their standard splits of classes.

Where pytorch-metric-learning has a set's standard split, its class reads it; the others are read from their lists.
But:
- Omniglot is listed from its folders, as torchvision's class wants the archives beside them.
- VehicleID is tested as its authors do: the gallery is one random image of each vehicle, ten times, and averaged.
- In-Shop's training classes have no queries; validation classes, which are taken from them, are retrieved among
  themselves.
"""

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from dml_core.data import files
from dml_core.data.datasets import GALLERY, NEITHER, QUERY, Collection, LabelledImages, Splits, names_array


class Benchmark(NamedTuple):
    """A published set: where it comes from, how it is read, and what belongs to it.

    Attributes:
        title: Its name.
        load: Reads the folder that the archive was unpacked in.
        expected: The published numbers, as `count_parts` returns them.
        source: Where it comes from, and what to unpack where.
        fetch: Downloads it into a folder; None: it cannot be had without an account.
        metrics: What its papers report besides R@k, names of dml_core/retrieval/scores.py.
    """

    title: str
    load: Callable[[Path], Collection]
    expected: dict[str, int]
    source: str
    fetch: Callable[[str], object] | None = None
    metrics: tuple[str, ...] = ()


def count_parts(splits: Splits) -> dict[str, int]:
    """Count the classes and images of each part.

    Args:
        splits: The splits with validation_fraction 0, as published.

    Returns:
        train_classes, train_images, test_classes, test_images (or test_queries and test_gallery), and the same of
        further tests.
    """
    numbers = {"train_classes": len(splits.train.class_names), "train_images": len(splits.train)}
    for prefix, task in splits.tests.items():
        name = prefix.removeprefix("test_")
        numbers[f"{name}_classes"] = len(task.query.class_names)
        if task.gallery is None:
            numbers[f"{name}_images"] = len(task.query)
        else:
            numbers |= {f"{name}_queries": len(task.query), f"{name}_gallery": len(task.gallery)}
    return numbers


def load_cub(root: Path) -> Collection:
    """Read CUB_200_2011."""
    from pytorch_metric_learning.datasets import CUB

    root = _archive_root(root, "CUB_200_2011/images.txt", "cub")
    return _from_library(root, CUB(root), CUB(root, "test"), lambda path: path.parent.name)


def load_sop(root: Path) -> Collection:
    """Read Stanford_Online_Products."""
    from pytorch_metric_learning.datasets import StanfordOnlineProducts as SOP

    root = _archive_root(root, "Stanford_Online_Products/Ebay_train.txt", "sop")
    return _from_library(root, SOP(root), SOP(root, "test"), lambda path: path.name.rpartition("_")[0])


def load_cars(root: Path) -> Collection:
    """Read cars_annos.mat beside car_ims, the csv files beside car_data, or the folder tree car_data alone."""
    if (root / "cars_annos.mat").is_file():
        return _cars_from_matrix(root)
    if all((root / name).is_file() for name in ("names.csv", "anno_train.csv", "anno_test.csv")):
        from pytorch_metric_learning.datasets import Cars196

        return _from_library(root, Cars196(root), Cars196(root, "test"), lambda path: path.parent.name)
    for tree in (root, root / "car_data", root / "car_data" / "car_data"):
        if (tree / "train").is_dir() and (tree / "test").is_dir():
            return _cars_from_folders(tree)
    raise _missing("cars", root, "cars_annos.mat, anno_train.csv or car_data/train")


def _cars_from_matrix(root: Path) -> Collection:
    from scipy.io import loadmat

    matrix = loadmat(root / "cars_annos.mat", squeeze_me=True)
    names = [str(name) for name in matrix["class_names"]]
    labels = matrix["annotations"]["class"].astype(np.int64) - 1
    paths = [str(path) for path in matrix["annotations"]["relative_im_path"]]
    images = LabelledImages(names_array(paths), labels, tuple(names), files.below(str(root)))
    return Collection(images, np.arange(98, len(names)))


def _cars_from_folders(tree: Path) -> Collection:
    """Read both parts of the archive's own split, which share all classes, numbered in the order of their names."""
    names = sorted({folder.name for part in ("train", "test") for folder in (tree / part).iterdir() if folder.is_dir()})
    paths, labels = [], []
    for number, name in enumerate(names):
        for part in ("train", "test"):
            pictures = sorted(os.listdir(tree / part / name)) if (tree / part / name).is_dir() else []
            paths += [f"{part}/{name}/{file}" for file in pictures]
            labels += [number] * len(pictures)
    images = LabelledImages(names_array(paths), np.array(labels), tuple(names), files.below(str(tree)))
    return Collection(images, np.arange(98, len(names)))


def load_inshop(root: Path) -> Collection:
    """Read list_eval_partition.txt and the pictures beside it or in Img."""
    listing = "list_eval_partition.txt"
    listings = [f for f in (root / listing, root / "Eval" / listing, root / "Anno" / listing) if f.is_file()]
    if not listings:
        raise _missing("inshop", root, listing)
    rows = [line.split() for line in listings[0].read_text().splitlines()[2:] if line.strip()]
    base = root / "Img" if (root / "Img").is_dir() else root
    names = sorted({item for _, item, _ in rows})
    number = {name: i for i, name in enumerate(names)}
    labels = np.array([number[item] for _, item, _ in rows])
    part = np.array([part for _, _, part in rows])
    role = np.select([part == "query", part == "gallery"], [QUERY, GALLERY], NEITHER)
    images = LabelledImages(names_array([path for path, _, _ in rows]), labels, tuple(names), files.below(str(base)))
    return Collection(images, np.unique(labels[part != "train"]), role=role)


def load_vehicleid(root: Path) -> Collection:
    """Read VehicleID_V1.0, with its small, medium and large test list."""
    root = next((r for r in (root, root / "VehicleID_V1.0") if (r / "train_test_split").is_dir()), root)
    lists = {"small": 800, "medium": 1600, "large": 2400}
    list_files = {"train": root / "train_test_split" / "train_list.txt"}
    list_files |= {name: root / "train_test_split" / f"test_list_{size}.txt" for name, size in lists.items()}
    if missing := [str(path.relative_to(root)) for path in list_files.values() if not path.is_file()]:
        raise _missing("vehicleid", root, ", ".join(missing))
    rows = {name: [line.split() for line in path.read_text().splitlines() if line] for name, path in list_files.items()}
    vehicle = {image: item for part in rows.values() for image, item in part}
    names = sorted({*vehicle.values()}, key=int)
    number = {name: i for i, name in enumerate(names)}
    classes = {name: np.unique([number[item] for _, item in part]) for name, part in rows.items()}
    labels = np.array([number[item] for item in vehicle.values()])
    paths = names_array([f"image/{image}.jpg" for image in vehicle])
    images = LabelledImages(paths, labels, tuple(names), files.below(str(root)))
    test = np.unique(np.concatenate([classes[name] for name in lists]))
    return Collection(images, test, lists={name: classes[name] for name in lists}, draws=10)


def load_grocery(root: Path) -> Collection:
    """Read the 81 fine classes, of which odd ids are tested on. Queries are those of test.txt, from other shops."""
    folder = root / "dataset" if (root / "dataset").is_dir() else root
    needed = [folder / name for name in ("classes.csv", "train.txt", "val.txt", "test.txt")]
    if missing := [path.name for path in needed if not path.is_file()]:
        raise _missing("grocery", root, ", ".join(missing))
    with open(needed[0], newline="") as file:
        names = {int(row["Class ID (int)"]): row["Class Name (str)"] for row in csv.DictReader(file)}
    paths, labels, role = [], [], []
    for listing in needed[1:]:
        for line in listing.read_text().splitlines():
            name, fine, _ = line.split(",")
            paths.append(name.strip())
            labels.append(int(fine))
            role.append(QUERY if listing.name == "test.txt" else GALLERY)
    class_names = tuple(names[i] for i in range(len(names)))
    images = LabelledImages(names_array(paths), np.array(labels), class_names, files.below(str(folder)))
    return Collection(images, np.arange(1, len(names), 2), role=np.array(role))


def load_omniglot(root: Path) -> Collection:
    """Read the characters: the 30 background alphabets are trained on, the 20 evaluation alphabets tested on."""
    root = next((r for r in (root / "omniglot-py", root) if (r / "images_background").is_dir()), root)
    paths, names, labels, test = list[str](), list[str](), list[int](), list[int]()
    for part in ("images_background", "images_evaluation"):
        if not (root / part).is_dir():
            raise _missing("omniglot", root, part)
        for character in sorted(_folders(root / part, 2)):
            drawings = sorted(p for p in character.iterdir() if p.suffix == ".png")
            if part == "images_evaluation":
                test.append(len(names))
            paths += [str(p.relative_to(root)) for p in drawings]
            labels += [len(names)] * len(drawings)
            names.append(f"{character.parent.name}/{character.name}")
    images = LabelledImages(names_array(paths), np.array(labels), tuple(names), files.below(str(root)))
    return Collection(images, np.array(test))


def _folders(root: Path, depth: int) -> Iterator[Path]:
    """Yield the folders so many levels below root."""
    for folder in root.iterdir():
        if folder.is_dir():
            yield from _folders(folder, depth - 1) if depth > 1 else [folder]


class _LibrarySet(Protocol):
    """A data set of pytorch-metric-learning."""

    paths: Sequence[str]
    labels: Sequence[int]


def _from_library(root: Path, whole: _LibrarySet, test: _LibrarySet, class_of: Callable[[Path], str]) -> Collection:
    """Convert a set of pytorch-metric-learning and its test part; class_of: path of a picture -> name of its class."""
    ids, labels = np.unique(whole.labels, return_inverse=True)
    names = {label: class_of(Path(path)) for label, path in zip(whole.labels, whole.paths, strict=True)}
    paths = names_array([os.path.relpath(path, root) for path in whole.paths])
    images = LabelledImages(paths, labels, tuple(names[i] for i in ids.tolist()), files.below(str(root)))
    return Collection(images, np.searchsorted(ids, np.unique(test.labels)))


def _archive_root(root: Path, marker: str, name: str) -> Path:
    """Return root, or the folder above it where root is the archive's own top folder; `marker` is a file below it."""
    if not (root / marker).is_file() and (root.parent / marker).is_file() and root.name == marker.split("/")[0]:
        return root.parent
    if not (root / marker).is_file():
        raise _missing(name, root, marker)
    return root


def _missing(name: str, root: Path, what: str) -> ValueError:
    """Return the error for a folder that is not the benchmark, with where to get it."""
    benchmark = BENCHMARKS[name]
    advice = "data.download=true fetches it" if benchmark.fetch else "get it"
    return ValueError(f"data.root={root}: not {benchmark.title}, there is no {what}; {advice} from {benchmark.source}")


def _fetch(name: str) -> Callable[[str], object]:
    """Return a function that downloads a set by its class in pytorch-metric-learning."""

    def fetch(root: str) -> object:
        from pytorch_metric_learning import datasets

        return getattr(datasets, name)(root, download=True)

    return fetch


def _fetch_omniglot(root: str) -> None:
    from torchvision.datasets import Omniglot

    for background in (True, False):
        Omniglot(root, background=background, download=True)


BENCHMARKS = {
    "cub": Benchmark(
        "CUB-200-2011",
        load_cub,
        {"train_classes": 100, "train_images": 5864, "test_classes": 100, "test_images": 5924},
        "data.caltech.edu/records/65de6-vp158: unpack CUB_200_2011.tgz in data.root",
        _fetch("CUB"),
    ),
    "cars": Benchmark(
        "Cars-196",
        load_cars,
        {"train_classes": 98, "train_images": 8054, "test_classes": 98, "test_images": 8131},
        "kaggle.com/datasets/jutrera/stanford-car-dataset-by-classes-folder (a folder tree), or the authors' "
        "car_ims.tgz and cars_annos.mat: unpack them in data.root",
        _fetch("Cars196"),
    ),
    "sop": Benchmark(
        "Stanford Online Products",
        load_sop,
        {"train_classes": 11318, "train_images": 59551, "test_classes": 11316, "test_images": 60502},
        "github.com/rksltnl/Deep-Metric-Learning-CVPR16: unpack Stanford_Online_Products.zip in data.root",
        _fetch("StanfordOnlineProducts"),
    ),
    "inshop": Benchmark(
        "In-Shop Clothes Retrieval (DeepFashion)",
        load_inshop,
        {
            "train_classes": 3997,
            "train_images": 25882,
            "test_classes": 3985,
            "test_queries": 14218,
            "test_gallery": 12612,
        },
        "mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html (on request): unpack img.zip and list_eval_partition.txt "
        "in data.root",
        metrics=("map", "cmc"),
    ),
    "vehicleid": Benchmark(
        "PKU VehicleID",
        load_vehicleid,
        {
            "train_classes": 13134,
            "train_images": 110178,
            "small_classes": 800,
            "medium_classes": 1600,
            "large_classes": 2400,
        },
        "www.pkuml.org/resources/pku-vehicleid.html (on request): unpack VehicleID_V1.0 in data.root",
        metrics=("map", "cmc"),
    ),
    "grocery": Benchmark(
        "the Grocery Store Dataset",
        load_grocery,
        {
            "train_classes": 41,
            "train_images": 2781,
            "test_classes": 40,
            "test_queries": 1197,
            "test_gallery": 1443,
        },
        "github.com/marcusklasson/GroceryStoreDataset: clone it, and give its folder as data.root",
    ),
    "omniglot": Benchmark(
        "Omniglot",
        load_omniglot,
        {"train_classes": 964, "train_images": 19280, "test_classes": 659, "test_images": 13180},
        "github.com/brendenlake/omniglot: unpack images_background.zip and images_evaluation.zip in data.root",
        _fetch_omniglot,
    ),
}
