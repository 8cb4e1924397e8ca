"""Ray Data gives the same pictures in the same order as a DataLoader, and the same training."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from dml_core.data import transforms
from dml_core.data.loading import Views
from dml_core.data.own import load_folder
from pipelines import jobs
from pipelines.recipe import load
from pipelines.streaming import StreamedViews

QUIET = Console(file=io.StringIO())


@pytest.fixture(autouse=True, scope="module")
def surroundings(local_ray: None, mlflow_server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before, folder = Path.cwd(), tmp_path_factory.mktemp("streamed")
    os.chdir(folder)
    os.environ["MLFLOW_TRACKING_URI"] = mlflow_server.uri
    mlflow.set_tracking_uri(mlflow_server.uri)
    yield
    os.chdir(before)
    del os.environ["MLFLOW_TRACKING_URI"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("set"), np.random.default_rng(0)
    for name in range(8):
        (root / f"class {name}").mkdir()
        for number in range(6):
            noise = rng.integers(0, 255, (60, 50, 3)).astype(np.uint8)
            Image.fromarray(noise).save(root / f"class {name}" / f"{number}.jpg")
    return root


def test_same_pictures_in_the_same_order(root: Path) -> None:
    images = load_folder(str(root)).images
    views = Views(images, transforms.evaluation(16), transforms.training("crop", 16))
    rng = np.random.default_rng(1)
    rows = [[(int(i), int(s) if s else None) for i, s in rng.integers(0, 48, (size, 2))] for size in (4, 4, 1, 7, 4, 3)]
    streamed = list(StreamedViews(views).batches(rows))
    for one, other in zip(streamed, views.batches(rows), strict=True):
        assert torch.equal(one, other)


def test_training_does_not_see_who_decodes(root: Path) -> None:
    given = [f"data.root={root}", "data.name=folder", "data.image_size=32", "data.augment=crop", "epochs=2"]
    given += ["batch.classes=3", "batch.images=4", "steps_per_epoch=3", "precision=float64"]
    given += ["backbone.name=small", "backbone.weights=none", "data.validation_fraction=0"]
    outcomes = [
        jobs.train(load("glyphs", [*given, f"data.loader={loader}", "workers=1"]), QUIET, here=True)
        for loader in ("torch", "ray")
    ]
    curves = []
    for outcome in outcomes:
        history = mlflow.MlflowClient().get_metric_history(outcome.run_id, "train/step_loss")
        curves.append([m.value for m in sorted(history, key=lambda m: m.step)])
    assert len(curves[0]) == 6
    assert curves[0] == curves[1]
    assert outcomes[0].metrics["test/map_at_r"] == outcomes[1].metrics["test/map_at_r"]
    assert 0 <= outcomes[1].metrics["train/data_wait"] <= 1
