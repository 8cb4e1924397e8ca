"""Trainings whose pictures are on the web or whose runs are in a bucket, and a server that goes away on the way."""

from collections.abc import Iterator
from pathlib import Path

import boto3
import mlflow
import numpy as np
import psutil
import pytest
import torch
from moto.server import ThreadedMotoServer
from PIL import Image
from pyarrow.fs import FileSelector, FileSystem

from dml_core.data import files
from dml_core.data.loading import Views
from dml_core.data.user_sets import load_folder
from pipelines.config.recipe import load_recipe
from pipelines.console import QUIET, RunFailed
from pipelines.data import features as feature_cache
from pipelines.runs.evaluate import evaluate_run
from pipelines.runs.train import run_training

PLANTED = "planted-secret-8f3a"


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


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """s3://... of an S3 server on this machine, whose keys the environment has."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, PLANTED)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="results")
    yield "s3://results/runs"
    server.stop()


def test_runs_and_features_in_a_bucket(
    local_ray: None, mlflow_server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is continued from the bucket, features are taken from it, and no key is left in any of the two."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    given = ["data.limit_classes=12", "batch.classes=4", "batch.images=4", "steps_per_epoch=3", "epochs=3"]
    given += ["backbone.frozen=true", f"storage={bucket}", "name=far", "workers=1"]
    outcome = run_training(load_recipe("glyphs", given), QUIET, here=True)
    assert outcome.checkpoint.startswith(f"{bucket}/far/epoch_")
    files, _ = FileSystem.from_uri(bucket)
    kept = {info.path for info in files.get_file_info(FileSelector("results", recursive=True)) if info.is_file}
    (features,) = [path for path in kept if path.startswith("results/runs/features/")]

    monkeypatch.setenv("DML_CACHE", str(tmp_path / "another node"))
    files.delete_file("results/runs/far/result.json")
    files.delete_dir("results/runs/far/epoch_00003")
    monkeypatch.setattr(feature_cache, "_compute", None)
    again = run_training(load_recipe("glyphs", given), QUIET, here=True)
    assert again.metrics["test/map_at_r"] == outcome.metrics["test/map_at_r"]
    assert Path(tmp_path / "another node" / "features" / Path(features).name).is_file()
    # Ray's workers, which began before, have neither the keys nor this address in their environment.
    found = evaluate_run(outcome.checkpoint, {"workers": 1, "storage": str(tmp_path)}, QUIET)
    assert found["metrics"]["test/map_at_r"] == outcome.metrics["test/map_at_r"]

    texts = [path for path in kept if path.endswith((".json", ".yaml"))]
    assert texts and not any(PLANTED.encode() in files.open_input_stream(path).read() for path in kept)
    with pytest.raises(ValueError, match="the address holds a secret") as told:
        load_recipe("glyphs", [f"storage=s3://key:{PLANTED}@results/runs"])
    assert PLANTED not in str(told.value)


def test_a_bucket_that_goes_away_fails_the_run_which_then_goes_on(
    cache: Path, mlflow_server, root: Path, web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    monkeypatch.setattr(files, "FIRST_WAIT", 0.01)
    url, server = web(root)
    given = ["data.name=table", f"data.table={url}/table.csv", "data.image_size=32", "data.augment=crop", "epochs=3"]
    given += ["data.validation_fraction=0", "data.loader_processes=0", "batch.classes=3", "batch.images=4", "workers=1"]
    given += ["backbone.name=small", "backbone.weights=none", "steps_per_epoch=3", "precision=float64"]
    undisturbed = run_training(load_recipe("glyphs", [*given, "name=undisturbed"]), QUIET, here=True)
    disturbed = load_recipe("glyphs", [*given, "name=disturbed"])
    server.answers, server.failures = 50, 10**9  # 36 pictures an epoch
    with pytest.raises(RunFailed, match=r"ConnectionError: http://.*jpg: 5 attempts failed"):
        run_training(disturbed, QUIET, here=True)
    server.failures = 0
    outcome = run_training(disturbed, QUIET, here=True)
    client, curves = mlflow.MlflowClient(mlflow_server.uri), []
    for run in (undisturbed, outcome):
        history = client.get_metric_history(run.run_id, "train/step_loss")
        curves.append(sorted((m.step, m.value) for m in history))
    assert len(curves[0]) == 9 and curves[0] == curves[1]
    assert outcome.metrics["test/map_at_r"] == undisturbed.metrics["test/map_at_r"]


def test_memory_is_flat_over_ten_epochs(root: Path) -> None:
    images = load_folder(str(root)).images
    views = Views(images, 224, "crop")
    rows = [[(i, epoch * 24 + i) for i in range(24)] for epoch in range(60)]
    resident = [psutil.Process().memory_info().rss for batch in views.batches(rows) if torch.is_tensor(batch)]
    assert max(resident[12:]) - max(resident[:12]) < 20 * 2**20  # ten epochs of six batches; one batch is 3.6 MB
