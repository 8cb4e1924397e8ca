"""The whole way, on real Ray workers, with MLflow over HTTP."""

import io
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from dml_core.gather import rank
from dml_core.learner import Terms
from pipelines.cli import main
from pipelines.cluster.in_process import run_in_process
from pipelines.cluster.threads import torch_threads
from pipelines.cluster.worker import Job, Worker
from pipelines.config.recipe import load_recipe, with_values
from pipelines.console import QUIET, RunFailed
from pipelines.models.checkpoint import read_config, read_data, read_history
from pipelines.models.run_folder import checkpoint_name
from pipelines.runs.outcome import TrainOutcome
from pipelines.runs.train import run_training
from pipelines.tracking.models import fetch_checkpoint
from pipelines.training.job import TrainingJob
from pipelines.training.loop import train_loop
from tests import ranks
from tests.pipelines.conftest import EXACT

pytestmark = pytest.mark.usefixtures("tracked_folder", "local_ray")
SMALL = ["data.limit_classes=20", "batch.classes=4", "batch.images=4", "epochs=2", "steps_per_epoch=6"]


def train(*assignments: str) -> TrainOutcome:
    """Alone in this process, or on several workers."""
    return run_training(load_recipe("glyphs", [*SMALL, *assignments]), QUIET, here="workers=1" in assignments)


def step_losses(outcome: TrainOutcome) -> np.ndarray:
    history = mlflow.MlflowClient().get_metric_history(outcome.run_id, "train/step_loss")
    steps = sorted((m.step, m.value) for m in history)
    assert [step for step, _ in steps] == list(range(len(steps)))
    return np.array([value for _, value in steps])


def assert_like_one_worker(exact: dict[int, TrainOutcome], losses: np.ndarray, metrics: dict[str, float]) -> None:
    alone = step_losses(exact[1])
    assert len(alone) == 48 and alone[0] != alone[-1]
    np.testing.assert_array_equal(losses, alone)
    for key, value in exact[1].metrics.items():
        if "images_per_second" not in key and "data_wait" not in key and "startup_seconds" not in key:
            assert metrics[key] == value, key


def test_two_workers_change_no_loss_and_no_metric(exact: dict[int, TrainOutcome]) -> None:
    assert_like_one_worker(exact, step_losses(exact[2]), exact[2].metrics)
    one, two = (read_data(Path(exact[workers].checkpoint)) for workers in (1, 2))
    assert one is not None and one == two


def train_in_group(job: TrainingJob, folder: Path, cache: Path) -> None:
    os.environ["DML_CACHE"] = str(cache)
    metrics = train_loop(job).metrics
    if rank() == 0:
        (folder / "metrics.json").write_text(json.dumps(metrics))


def test_four_workers_change_no_loss_and_no_metric(exact: dict[int, TrainOutcome], tmp_path: Path, cache: Path) -> None:
    """The loop that Ray's workers run, in a group of processes without Ray, which takes them a minute to start."""
    values = {"workers": 4, "storage": str(tmp_path), "name": "exact4"}
    config = with_values(read_config(Path(exact[2].checkpoint)), values)
    ranks.run(train_in_group, 4, TrainingJob(config, worker=Worker(report=dict)), tmp_path, cache)
    history = read_history(tmp_path / "exact4" / checkpoint_name(6))
    losses = np.concatenate([record["step_loss"] for record in history])
    assert_like_one_worker(exact, losses, json.loads((tmp_path / "metrics.json").read_text()))


def test_ddp_on_ray_is_exact_but_for_rounding(exact: dict[int, TrainOutcome]) -> None:
    """By way of ray.train.torch.prepare_model, in float64, with all methods: rounding grows from step to step."""
    outcome = run_training(load_recipe(EXACT[0], [*EXACT[1:], "workers=2", "gradients=ddp", "name=ddp"]), QUIET)
    losses, expected = step_losses(outcome), step_losses(exact[1])
    np.testing.assert_allclose(losses[:16], expected[:16], rtol=1e-9, atol=0)  # of two epochs
    np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=0)
    assert outcome.metrics["val/map_at_r"] == pytest.approx(exact[1].metrics["val/map_at_r"], abs=0.02)


def test_a_run_goes_on_with_other_gradients_only_if_asked(tracked_folder: Path) -> None:
    asked = ["workers=1", "precision=float64", "name=switched"]
    outcome = train(*asked, "gradients=ddp")
    folder = Path(outcome.checkpoint).parent
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "epoch_00002")
    with pytest.raises(ValueError, match=r"gradients=exact \(was ddp\).*--switch-gradients"):
        train(*asked)
    config = load_recipe("glyphs", [*SMALL, *asked])
    again = run_training(config, QUIET, here=True, switch_gradients=True)
    np.testing.assert_allclose(step_losses(again), step_losses(outcome), rtol=1e-9, atol=0)
    run = mlflow.get_run(again.run_id)
    assert again.run_id == outcome.run_id and run.data.params["gradients"] == "ddp"
    assert run.data.tags["gradients"] == "exact since this run was continued"
    assert read_config(Path(again.checkpoint)).gradients == "exact"


def test_a_run_goes_on_from_the_middle_of_an_epoch(tracked_folder: Path) -> None:
    """From step 5 of the second epoch, for which IAA has estimated already; none of its steps is drawn anew."""
    asked = ["method=[iaa,namr]", "iaa.start=0", "iaa.update_every=1", "evaluate_every=2", "checkpoint_every=5"]
    outcome = train("workers=1", "precision=float64", "steps_per_epoch=8", "name=middle", *asked)
    whole, folder = step_losses(outcome), Path(outcome.checkpoint).parent
    history = read_history(folder / "epoch_00002")
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "epoch_00002")
    assert [path.name for path in folder.glob("epoch_*")] == ["epoch_00001_step_0000007"]
    again = train("workers=1", "precision=float64", "steps_per_epoch=8", "name=middle", *asked)
    assert again.run_id == outcome.run_id and (step_losses(again) == whole).all() and len(whole) == 16
    for one, other in zip(history, read_history(folder / "epoch_00002"), strict=True):
        assert one["step_loss"] == other["step_loss"]
        timed = {"train/images_per_second", "train/data_wait", "train/startup_seconds"}
        assert {k: v for k, v in one["metrics"].items() if k not in timed} == {
            k: v for k, v in other["metrics"].items() if k not in timed
        }
    same = {k: v for k, v in outcome.metrics.items() if k not in timed}
    assert same == {k: v for k, v in again.metrics.items() if k not in timed}


def test_run_is_whole_in_mlflow(exact: dict[int, TrainOutcome]) -> None:
    outcome, client = exact[2], mlflow.MlflowClient()
    run = client.get_run(outcome.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["sgar.intensity"] == "0.1" and run.data.params["precision"] == "float64"
    assert {"method", "base_loss", "backbone", "data", "seed", "git_commit", "workers", "group"} <= set(run.data.tags)
    for key in (*(f"train/{term}" for term in Terms._fields), "train/lr", "train/gradient_norm"):
        values = {m.step: m.value for m in client.get_metric_history(outcome.run_id, key)}
        assert [*values] == [1, 2, 3, 4, 5, 6] and values[1] != 0, key
    for key in ("val/map_at_r", "test/recall_at_1", "test/map_at_r", "untrained/map_at_r", "features/map_at_r"):
        assert key in run.data.metrics
    for way in ("test", "test_rerank", "test_exact"):
        assert run.data.metrics[f"{way}/map_at_r"] == outcome.metrics[f"{way}/map_at_r"]
    assert run.data.metrics["test/map_at_r"] == outcome.metrics["test/map_at_r"]
    assert run.inputs.dataset_inputs[0].dataset.name == "glyphs"
    groups = {client.get_run(exact[n].run_id).data.tags["group"] for n in (1, 2)}
    assert len(groups) == 1


def test_model_is_registered_and_embeds_pictures(exact: dict[int, TrainOutcome]) -> None:
    import pandas as pd

    name, version = exact[2].model.split("/")
    model = mlflow.pyfunc.load_model(f"models:/{name}/{version}")
    buffer = io.BytesIO()
    Image.new("RGB", (50, 40), (255, 0, 0)).save(buffer, "PNG")
    answer = model.predict(pd.DataFrame({"image": [buffer.getvalue()] * 3}))
    assert [*answer.columns] == model.metadata.get_output_schema().input_names() == ["vector", "structure"]
    embeddings = np.stack(answer["vector"])
    assert embeddings.shape == np.stack(answer["structure"]).shape == (3, 128) and embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)


def test_evaluate_repeats_the_test(exact: dict[int, TrainOutcome]) -> None:
    outcome = exact[2]
    found = CliRunner().invoke(main.app, ["evaluate", outcome.run_id, "workers=1", "--json"])
    assert found.exit_code == 0, found.output
    metrics = json.loads(found.stdout.splitlines()[-1])["metrics"]
    for key, value in metrics.items():
        assert outcome.metrics[key] == pytest.approx(value, rel=1e-9)


def test_run_model_and_folder_are_the_same_checkpoint(exact: dict[int, TrainOutcome]) -> None:
    outcome, uri = exact[2], os.environ["MLFLOW_TRACKING_URI"]
    manifest = (Path(outcome.checkpoint) / "manifest.json").read_text()
    for run in (outcome.run_id, f"models:/{outcome.model}"):
        assert (fetch_checkpoint(uri, run) / "manifest.json").read_text() == manifest


def test_the_same_name_again_repeats_the_outcome_or_refuses(exact: dict[int, TrainOutcome]) -> None:
    storage = Path(exact[1].checkpoint).parents[1]
    again = [*EXACT[1:], "workers=1", "name=exact1", f"storage={storage}"]
    assert run_training(load_recipe("glyphs", again), QUIET) == exact[1]
    with pytest.raises(ValueError, match=r"name=exact1 was begun with another config .*seed=1 \(was 0\)"):
        run_training(load_recipe("glyphs", [*again, "seed=1"]), QUIET)


@pytest.fixture(scope="module")
def folder_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("set"), np.random.default_rng(0)
    for name in range(10):
        pattern = np.kron(rng.integers(0, 255, (6, 5, 3)), np.ones((8, 8, 1)))
        (root / f"class {name}").mkdir()
        for number in range(6):
            noise = rng.normal(0, 20, (48, 40, 3))
            Image.fromarray((pattern + noise).clip(0, 255).astype(np.uint8)).save(
                root / f"class {name}" / f"{number}.jpg"
            )
    return root


FROZEN = ["data.name=folder", "data.image_size=48", "data.limit_classes=5", "batch.classes=4", "batch.images=2"]


def test_frozen_backbone_computes_its_features_once(folder_set: Path) -> None:
    """The same losses and metrics by two workers, who share what Ray's tasks decode, and by one, who finds it done."""
    cache = Path(os.environ["DML_CACHE"]) / "features"
    given = [*FROZEN, f"data.root={folder_set}", "backbone.frozen=true", "precision=float64"]
    given += ["backbone.name=efficientnet_lite0", "backbone.weights=imagenet"]
    before = {*cache.glob("*")}  # other tests' of this process
    two = train(*given, "workers=2", "data.loader=ray")
    files = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert [path.suffix for path in {*files} - before] == [".npy"]
    one = train(*given, "workers=1")
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == files
    np.testing.assert_allclose(step_losses(one), step_losses(two), rtol=1e-9)
    assert one.metrics["features/recall_at_1"] > 0.5


def test_bad_picture_on_the_way_fails_in_one_line(folder_set: Path) -> None:
    bad = folder_set / "class 3" / "0.jpg"
    content = bad.read_bytes()
    bad.write_bytes(b"no picture")
    try:
        given = [*SMALL, *FROZEN, f"data.root={folder_set}", "data.augment=crop", "backbone.name=small", "name=bad"]
        found = CliRunner().invoke(main.app, ["train", *given, "backbone.weights=none", "workers=1"])
    finally:
        bad.write_bytes(content)
    assert found.exit_code == 1
    assert "unreadable picture" in found.stderr and "class 3/0.jpg" in found.stderr
    runs = mlflow.search_runs(experiment_names=["folder"], filter_string="run_name = 'bad'")
    assert runs["status"].tolist() == ["FAILED"]


def test_without_validation_classes_the_last_epoch_is_the_best_and_has_no_score(tracked_folder: Path) -> None:
    outcome = train("data.validation_fraction=0", "workers=1", "name=unvalidated")
    assert outcome.metrics["best_epoch"] == 2 and outcome.checkpoint.endswith("epoch_00002")
    assert not any(name.startswith("val/") for name in outcome.metrics)
    logged = mlflow.MlflowClient().get_run(outcome.run_id).data.metrics
    assert "train/loss" in logged and "test/map_at_r" in logged
    assert not any(name.startswith("val/") for name in logged)


def test_a_registration_that_fails_is_told_and_leaves_the_training_finished(
    tracked_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    text = io.StringIO()
    config = load_recipe("glyphs", [*SMALL, "workers=1", "name=unregistered"])
    outcome = run_training(config, Console(file=text, width=1000), here=True)
    assert outcome.model is None
    assert mlflow.MlflowClient().get_run(outcome.run_id).info.status == "FINISHED"
    log = tracked_folder / "runs" / "unregistered" / "logs" / "driver.log"
    assert "the model is not registered: " in text.getvalue() and f"({log} has the traceback)" in text.getvalue()
    assert "Traceback (most recent call last)" in log.read_text() and "127.0.0.1:9" in log.read_text()
    again = run_training(config, QUIET, here=True)  # what is missing is tried again
    assert again.model is None and again.metrics["test/map_at_r"] == outcome.metrics["test/map_at_r"]


@dataclass(frozen=True)
class BrokenJob(Job):
    loop: ClassVar[str] = "tests.pipelines.runs.test_train:break_off"


def break_off(job: BrokenJob) -> None:
    torch.set_num_threads(1)
    raise LookupError("on purpose")


def test_the_number_of_threads_is_restored_when_a_loop_fails(local_ray: None) -> None:
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        with pytest.raises(RunFailed, match="LookupError: on purpose"):
            run_in_process(BrokenJob(load_recipe("glyphs", [])))
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
