"""Where a worker's batches come from, and who may decode them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dml_core.data.datasets import LabelledImages
from pipelines.cluster.devices import resolve_devices
from pipelines.cluster.progress import Reporter
from pipelines.config.recipe import load_recipe
from pipelines.data.features import _key
from pipelines.data.sets import identify, load_collection
from pipelines.data.sources import MOST_PROCESSES, Sources

ROWS = [[(3, 5), (1, 6)], [(0, 7)]]


def sources_of(cpus: int, *settings: str) -> Sources:
    learner: Any = None
    config = load_recipe("glyphs", settings)
    return Sources(config, learner, torch.device("cpu"), cpus, Reporter(None), identify(config.data))


def embedded(side: int) -> LabelledImages:
    pixels = np.random.default_rng(0).integers(0, 255, (6, side, side), np.uint8)
    return LabelledImages(pixels, np.zeros(6, np.int64), ("a",))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        path = tmp_path / "set" / f"class {number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((60, 50), 80).convert("RGB").save(path)
    return tmp_path / "set"


@pytest.mark.parametrize(("side", "augment"), [(32, "shift"), (32, "none"), (32, "crop"), (20, "shift")])
def test_embedded_pictures_lie_on_the_device_once_where_they_have_the_size_of_views(side: int, augment: str) -> None:
    images, sources = embedded(side), sources_of(2, f"data.augment={augment}")
    parts = images.select(np.arange(1, 5)), images.select(np.arange(5)[::-1].copy())
    residents = [sources.of(part).resident for part in parts]
    is_resident = side == 32 and augment != "crop"
    assert (residents[0] is not None) == is_resident and residents[0] is residents[1]
    for part in parts:
        for batch, rows in zip(sources.batches(part, ROWS), ROWS, strict=True):
            assert batch.shape == (len(rows), 3, 32, 32) and batch.dtype == torch.uint8
            if augment == "none":
                pixels = torch.from_numpy(part.names[[sample for sample, _ in rows]])
                assert torch.equal(batch, pixels[:, None].expand(-1, 3, -1, -1))


def test_all_cpus_but_one_decode(folder: Path) -> None:
    given = ["data.name=folder", f"data.root={folder}"]
    counts = [sources_of(cpus, *given).processes for cpus in (1, 2, 12, 200)]
    assert counts == [0, 1, 11, MOST_PROCESSES]
    assert sources_of(4, *given, "data.loader_processes=9").processes == 9
    assert sources_of(4).processes == 0


def test_decoding_by_gpu_needs_one_and_has_features_of_its_own(folder: Path) -> None:
    given = ["data.name=folder", f"data.root={folder}", "workers=1"]
    for more in ([], ["use_gpu=false"]):
        config = load_recipe("glyphs", [*given, "data.decode=gpu", *more])
        with pytest.raises(ValueError, match=r"^data.decode=gpu: this run uses no GPU \(use_gpu\); allowed: cpu$"):
            resolve_devices(config, here=True)
    learner: Any = torch.nn.Module()
    learner.backbone = torch.nn.Linear(1, 1)
    keys = set()
    for decode in ("cpu", "gpu"):
        sources = sources_of(1, *given, f"data.decode={decode}")
        keys.add(_key(sources.config, sources.data, learner, load_collection(sources.config.data).images))
    assert len(keys) == 2
