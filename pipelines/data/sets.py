"""From the data section of a config to a set of labelled images and its splits."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from dml_core.data import benchmarks, datasets, glyphs, user_sets
from dml_core.data.datasets import Collection, LabelledImages, Retrieval, SetIdentity, Splits, names_array
from pipelines.config.schema import Config
from pipelines.config.sections import Data
from pipelines.kept import once

LOGGER = logging.getLogger(__name__)
FOLD_KEYS = {"fold", "folds", "validation_fraction"}  # in which the folds of a trial differ; the whole set is the same


def cache_folder() -> Path:
    """Return the folder for rendered glyphs and features: DML_CACHE, or dml-ray in the user's cache folder."""
    if folder := os.environ.get("DML_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dml-ray"


def describe_sets() -> dict[str, str]:
    """Return where each set comes from and how a config names it, by its `data.name`."""
    descriptions = {
        "glyphs": "embedded: characters in the fonts of matplotlib, rendered at the first use",
        "folder": "your pictures, one folder a class: data.root=FOLDER, or a URL (s3://, gs://, abfs://)",
        "table": "your pictures, a CSV or Parquet file with path, label [, split] [, role] [, camera]: data.table=FILE",
    }
    sets = benchmarks.BENCHMARKS.items()
    return descriptions | {name: f"{s.title}: data.root=FOLDER; from {s.source}" for name, s in sets}


def load_collection(config: Data, unreadable: Sequence[str] = (), labelled: bool = True) -> Collection:
    """Load a set as it is, before any split.

    Args:
        config: Of the set.
        unreadable: Names of pictures to leave out.
        labelled: False takes users' own pictures without labels, too, as of a class "".

    Raises:
        ValueError: It is missing, or something is wrong with it; or it has entries that cannot be read, and
            on_bad_image=fail.
    """
    whole = once(("set", config.model_dump_json(exclude=FOLD_KEYS), labelled), lambda: _load_whole(config, labelled))
    if whole.unreadable and config.on_bad_image == "fail":
        name, reason = next(iter(whole.unreadable.items()))
        raise ValueError(
            f"data.root={config.root}: {len(whole.unreadable)} entries cannot be read, {name} first ({reason}); "
            f"data.on_bad_image=skip leaves them out"
        )
    return whole.without(np.isin(whole.images.names, names_array([*unreadable]))) if unreadable else whole


def _load_whole(config: Data, labelled: bool) -> Collection:
    if config.name == "glyphs":
        images, labels, names = glyphs.load(cache_folder())
        return Collection(LabelledImages(images, labels, tuple(names)))
    if config.name == "table":
        assert config.table
        unpacked = cache_folder() / "tables"
        return user_sets.load_table(config.table, config.root, config.links, labelled, config.exclude or (), unpacked)
    assert config.root
    if config.name == "folder":
        whole = user_sets.load_folder(config.root, config.links, labelled, config.exclude or (), config.pattern)
        return _with_test_classes(config, whole)
    benchmark = benchmarks.BENCHMARKS[config.name]
    if config.download:
        assert benchmark.fetch
        try:
            benchmark.fetch(config.root)
        except OSError as error:
            raise OSError(f"data.download=true: {benchmark.title} cannot be fetched ({error})") from None
    return benchmark.load(Path(config.root))


def identify(config: Data, tell: Callable[[str], object] = LOGGER.info, labelled: bool = True) -> SetIdentity:
    """Return what tells a set, as it is now, from all others.

    Args:
        config: Of the set.
        tell: Called with a line where contents of files must be read to know them again.
        labelled: See load_collection.

    Raises:
        ValueError: It is missing, something is wrong with it, or its server does not answer.
    """
    whole = load_collection(config, labelled=labelled)
    try:
        return whole.identity(tell)
    except ConnectionError as error:
        raise ValueError(str(error)) from None


def load_splits(config: Config, unreadable: Sequence[str] = ()) -> Splits:
    """Load a set and divide its classes into train, validation and tests.

    Args:
        config: Of the run.
        unreadable: Names of pictures to leave out.

    Raises:
        ValueError: The set is missing, or too small for the config's batch.
    """
    splits = once(("splits", config.data.model_dump_json(), *unreadable), lambda: _split(config.data, unreadable))
    classes = len(splits.train.class_names)
    if config.batch.classes > classes:
        raise ValueError(f"batch.classes={config.batch.classes}: the training set has only {classes} classes")
    return splits


def load_tests(config: Config, unreadable: Sequence[str] = (), every: bool = False) -> dict[str, Retrieval]:
    """Load a set's tests, by the prefix of their metrics; nothing is asked of classes to train on.

    Args:
        config: Of the run.
        unreadable: Names of pictures to leave out.
        every: Whether all classes are tested on, but where the set itself says which.

    Raises:
        ValueError: The set is missing, or has no class to test on.
    """
    return _split(config.data, unreadable, trains=False, every=every).tests


def _split(data: Data, unreadable: Sequence[str], trains: bool = True, every: bool = False) -> Splits:
    whole = load_collection(data, unreadable)
    if every and whole.test is None:
        whole = replace(whole, test=np.arange(len(whole.images.class_names)), validation=None)
        with named_by(data):
            return datasets.split(whole, limit_classes=data.limit_classes, seed=data.split_seed, trains=False)
    if whole.test is not None and data.test_fraction:
        raise ValueError("data.test_fraction cannot act: the set itself says which classes are tested on")
    if whole.validation is not None and (data.fold is not None or data.validation_fraction is not None):
        key = "validation_fraction" if data.fold is None else "fold"
        raise ValueError(f"data.{key} cannot act: the set itself says which classes are validated on")
    with named_by(data):
        return datasets.split(whole, *data.fractions, data.split_seed, data.fold_of, data.limit_classes, trains)


@contextmanager
def named_by(data: Data) -> Iterator[None]:
    """Have an error of the block name the set."""
    try:
        yield
    except ValueError as error:
        key = "table" if data.table else "root" if data.root else "name"
        raise ValueError(f"data.{key}={getattr(data, key)}: {error}") from None


def _with_test_classes(config: Data, whole: Collection) -> Collection:
    wanted, names = config.test_classes, whole.images.class_names
    if not wanted:
        return whole
    if whole.test is not None:
        raise ValueError("data.test_classes cannot act: the set itself says which classes are tested on")
    if unknown := sorted(set(wanted) - set(names)):
        raise ValueError(f"data.test_classes: no class folder is called {', '.join(unknown)}")
    return replace(whole, test=np.flatnonzero(np.isin(names, wanted)))
