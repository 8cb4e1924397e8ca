"""Ray's tasks give the same pictures in the same order as a DataLoader, and the same training."""

from pathlib import Path

import mlflow
import numpy as np
import pytest
from PIL import Image

from pipelines.config.recipe import load_recipe
from pipelines.console import QUIET
from pipelines.runs.train import run_training

pytestmark = pytest.mark.usefixtures("tracked_folder", "local_ray")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("set"), np.random.default_rng(0)
    for name in range(8):
        (root / f"class {name}").mkdir()
        for number in range(6):
            noise = rng.integers(0, 255, (60, 50, 3)).astype(np.uint8)
            Image.fromarray(noise).save(root / f"class {name}" / f"{number}.jpg")
    return root


def test_training_does_not_see_who_decodes(root: Path) -> None:
    given = [f"data.root={root}", "data.name=folder", "data.image_size=32", "data.augment=crop", "epochs=2"]
    given += ["batch.classes=3", "batch.images=4", "steps_per_epoch=3", "precision=float64"]
    given += ["backbone.name=small", "backbone.weights=none", "data.validation_fraction=0"]
    outcomes = [
        run_training(load_recipe("glyphs", [*given, f"data.loader={loader}", "workers=1"]), QUIET, here=True)
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
