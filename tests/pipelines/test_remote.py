"""A training whose pictures are on the web, and a server that goes away in the middle of an epoch."""

import io
from pathlib import Path

import mlflow
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from rich.console import Console

from dml_core.data import files, transforms
from dml_core.data.loading import Views
from dml_core.data.own import load_folder
from pipelines import jobs
from pipelines.launch import RunFailed
from pipelines.recipe import load

QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("set"), np.random.default_rng(0)
    lines = ["path,label"]
    for name in range(6):
        (root / str(name)).mkdir()
        for number in range(4):
            noise = rng.integers(0, 255, (40, 40, 3)).astype(np.uint8)
            Image.fromarray(noise).save(root / str(name) / f"{number}.jpg")
            lines.append(f"{name}/{number}.jpg,{name}")
    (root / "table.csv").write_text("\n".join(lines))
    return root


def test_a_bucket_that_goes_away_fails_the_run_which_then_goes_on(
    local_ray: None, mlflow_server, root: Path, web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    monkeypatch.setattr(files, "FIRST_WAIT", 0.01)
    url, server = web(root)
    given = ["data.name=table", f"data.table={url}/table.csv", "data.image_size=32", "data.augment=crop", "epochs=3"]
    given += ["data.validation_fraction=0", "data.loader_processes=0", "batch.classes=3", "batch.images=4", "workers=1"]
    given += ["backbone.name=small", "backbone.weights=none", "steps_per_epoch=3", "precision=float64"]
    undisturbed = jobs.train(load("glyphs", [*given, "name=undisturbed"]), QUIET, here=True)
    disturbed = load("glyphs", [*given, "name=disturbed"])
    server.answers, server.failures = 50, 10**9  # 36 pictures an epoch
    with pytest.raises(RunFailed, match=r"ConnectionError: http://.*jpg: 5 attempts failed"):
        jobs.train(disturbed, QUIET, here=True)
    server.failures = 0
    outcome = jobs.train(disturbed, QUIET, here=True)
    client, curves = mlflow.MlflowClient(mlflow_server.uri), []
    for run in (undisturbed, outcome):
        history = client.get_metric_history(run.run_id, "train/step_loss")
        curves.append(sorted((m.step, m.value) for m in history))
    assert len(curves[0]) == 9 and curves[0] == curves[1]
    assert outcome.metrics["test/map_at_r"] == undisturbed.metrics["test/map_at_r"]


def test_memory_is_flat_over_ten_epochs(root: Path) -> None:
    images = load_folder(str(root)).images
    views = Views(images, transforms.evaluation(224), transforms.training("crop", 224))
    rows = [[(i, epoch * 24 + i) for i in range(24)] for epoch in range(60)]
    resident = [psutil.Process().memory_info().rss for batch in views.batches(rows) if torch.is_tensor(batch)]
    assert max(resident[12:]) - max(resident[:12]) < 20 * 2**20  # ten epochs of six batches; one batch is 3.6 MB
