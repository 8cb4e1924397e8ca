"""Runs that begin with what an earlier one has learned, with MLflow over HTTP."""

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dml_core.gather import rank
from pipelines.cluster.worker import Worker
from pipelines.compare.comparison import compare_experiments
from pipelines.config.recipe import load_recipe, with_values
from pipelines.console import QUIET
from pipelines.models.checkpoint import model_fingerprint, read_class_names, read_config
from pipelines.models.run_folder import checkpoint_name
from pipelines.runs.outcome import TrainOutcome
from pipelines.runs.train import run_training
from pipelines.tracking.models import set_alias
from pipelines.training.job import TrainingJob
from pipelines.training.loop import train_loop
from tests import ranks
from tests.pipelines.conftest import answer, refused

pytestmark = pytest.mark.usefixtures("tracked_folder", "without_ray", "tracked_here")
BASE = ["data.limit_classes=20", "batch.classes=4", "batch.images=4", "workers=1", "embedding_dim=32"]
BASE += ["optimizer.lr=3e-3", "loss.name=proxy_anchor", "method=[iaa,sgar,namr]", "iaa.start=0", "iaa.update_every=1"]
TUNED = ["epochs=2", "steps_per_epoch=5", "seed=3", "optimizer.lr=1e-3"]
TIMED = {"train/images_per_second", "train/data_wait", "train/startup_seconds"}


def train(*assignments: str, console: Console = QUIET) -> TrainOutcome:
    config = load_recipe("glyphs", [*BASE, *assignments])
    return run_training(config, console, here=True)


def told(*assignments: str) -> tuple[TrainOutcome, str]:
    text = io.StringIO()
    return train(*assignments, console=Console(file=text, width=1000)), text.getvalue()


def refusal(*assignments: str) -> str:
    return refused("train", "glyphs", *BASE, *assignments).removeprefix("bad input: ")


def same_bits(one: TrainOutcome, other: TrainOutcome) -> bool:
    files = [json.loads(Path(o.checkpoint, "manifest.json").read_text())["learner.safetensors"] for o in (one, other)]
    metrics = [{key: value for key, value in o.metrics.items() if key not in TIMED} for o in (one, other)]
    return files[0] == files[1] and metrics[0] == metrics[1]


@pytest.fixture(scope="module")
def first(tracked_folder: Path, cache: Path) -> TrainOutcome:
    return train("name=first", "epochs=3", "steps_per_epoch=60")


@pytest.fixture(scope="module")
def tuned(first: TrainOutcome) -> tuple[TrainOutcome, str]:
    return told("name=tuned", f"start_from={first.run_id}", *TUNED)


def test_a_few_steps_from_a_good_run_beat_the_same_from_scratch(first, tuned, tracked_folder) -> None:
    scratch = train("name=scratch", *TUNED)
    for metric in ("test/map_at_r", "test/recall_at_1"):
        assert tuned[0].metrics[metric] > scratch.metrics[metric] + 0.05, metric
    assert tuned[0].metrics["train/loss"] < scratch.metrics["train/loss"]
    assert tuned[0].metrics["untrained/map_at_r"] == pytest.approx(first.metrics["test/map_at_r"], abs=1e-6)


def test_it_is_said_what_is_taken(first, tuned) -> None:
    said = "start_from: backbone, head, loss, iaa, sgar, namr of first; of 16 of 16 training classes, by name"
    assert said in tuned[1] and "was trained on" not in tuned[1]


def test_lineage_is_in_mlflow_in_the_report_and_in_the_groups(first, tuned, tracked_folder: Path) -> None:
    run, fingerprint = mlflow.get_run(tuned[0].run_id), model_fingerprint(Path(first.checkpoint))
    assert run.data.tags["start_from"] == first.run_id and run.data.tags["start_fingerprint"] == fingerprint
    assert run.data.params["start_from"] == f"first@{fingerprint[:12]}"
    answer("report", tuned[0].run_id, "--out", tracked_folder / "tuned.html")
    assert f"{first.run_id}, checkpoint {fingerprint[:12]}" in (tracked_folder / "tuned.html").read_text()
    scratch = train("name=scratch-of-group", *TUNED)
    lines = compare_experiments([tuned[0].run_id, scratch.run_id], log=False).comparison.lines
    assert {line.group for line in lines} == {f"start_from=first@{fingerprint[:12]}", "the rest as in all"}


def test_a_run_by_any_name_is_the_same_start(first, tuned, tracked_folder: Path) -> None:
    """As a folder, a run's folder, a URL, a registered model; and then it is the same group."""
    set_alias(os.environ["MLFLOW_TRACKING_URI"], str(first.model), "good")
    folder = Path(first.checkpoint)
    for number, text in enumerate(
        [
            str(folder),
            f"file://{folder}",
            os.path.relpath(folder.parent),
            f"models:/{str(first.model).partition('/')[0]}@good",
        ]
    ):
        outcome = train(f"name=as{number}", f"start_from={text}", *TUNED)
        assert same_bits(outcome, tuned[0]), text
        tags = mlflow.get_run(outcome.run_id).data.tags
        expected = mlflow.get_run(tuned[0].run_id).data.tags
        assert [tags[key] for key in ("group", "start_from")] == [expected[key] for key in ("group", "start_from")], (
            text
        )


def interrupt(outcome: TrainOutcome, *epochs: int) -> None:
    folder = Path(outcome.checkpoint).parent
    (folder / "result.json").unlink()
    for epoch in epochs:
        shutil.rmtree(folder / checkpoint_name(epoch))


@pytest.mark.parametrize("lost", [(2,), (1, 2)], ids=["after an epoch", "before the first checkpoint"])
def test_a_run_goes_on_with_what_it_began_with_whatever_its_name_means_now(
    lost: tuple[int, ...], first, tuned, tmp_path: Path, tracked_folder
) -> None:
    source = tmp_path / "source"
    shutil.copytree(first.checkpoint, source)
    asked = [f"name=goes-on-{len(lost)}", f"start_from={source}", *TUNED]
    outcome = train(*asked)
    assert same_bits(outcome, tuned[0])
    interrupt(outcome, *lost)
    shutil.rmtree(source)
    source.mkdir()
    again = train(*asked)
    assert again.run_id == outcome.run_id and same_bits(again, tuned[0])


def test_an_alias_that_has_moved_changes_no_run(first, tuned, tracked_folder) -> None:
    uri, model = os.environ["MLFLOW_TRACKING_URI"], str(first.model).partition("/")[0]
    set_alias(uri, str(first.model), "moving")
    asked = ["name=by-alias", f"start_from=models:/{model}@moving", *TUNED]
    outcome = train(*asked)
    interrupt(outcome, 2)
    set_alias(uri, str(tuned[0].model), "moving")
    assert same_bits(train(*asked), tuned[0])
    by_id = ["name=by-alias", f"start_from={first.run_id}", *TUNED]  # by another name, but the same checkpoint
    assert train(*by_id).run_id == outcome.run_id
    message = refusal("name=by-alias", f"start_from={tuned[0].run_id}", *TUNED)
    assert message.startswith(f"start_from={tuned[0].run_id}: name=by-alias was begun with another checkpoint, ")
    assert f"start_from=models:/{model}@moving (in " in message
    assert "was begun with start_from=models:/" in refusal("name=by-alias", *TUNED)


def train_in_group(job: TrainingJob, folder: Path, cache: Path) -> None:
    os.environ["DML_CACHE"] = str(cache)
    metrics = train_loop(job).metrics
    if rank() == 0:
        (folder / "metrics.json").write_text(json.dumps(metrics))


def test_two_workers_give_the_same_bits(tuned, tmp_path: Path, cache: Path) -> None:
    config = with_values(read_config(Path(tuned[0].checkpoint)), {"workers": 2, "storage": str(tmp_path)})
    shutil.copytree(Path(tuned[0].checkpoint).parent / "start", tmp_path / "tuned" / "start")
    ranks.run(train_in_group, 2, TrainingJob(config, worker=Worker(report=dict)), tmp_path, cache)
    metrics: dict[str, Any] = json.loads((tmp_path / "metrics.json").read_text())
    for key, value in tuned[0].metrics.items():
        assert key in TIMED or metrics[key] == value, key


def test_classes_that_are_tested_on_and_were_trained_on_are_told(tmp_path: Path, tracked_folder) -> None:
    rng = np.random.default_rng(0)
    for number in range(48):
        folder = tmp_path / f"c{number // 4:02d}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / f"{number}.png")
    given = ["data.name=folder", f"data.root={tmp_path}", "data.image_size=32", "data.limit_classes=null"]
    given += ["epochs=1", "steps_per_epoch=1", "data.validation_fraction=0.25"]
    earlier = train("name=before", "data.test_classes=[c00,c01,c02,c03]", *given)
    tested = ["c00", "c08", "c09", "c10", "c11"]
    outcome, text = told(
        "name=leaks", f"start_from={earlier.run_id}", f"data.test_classes=[{','.join(tested)}]", *given
    )
    trained = read_class_names(Path(earlier.checkpoint))
    seen = [name for name in tested if name in trained]
    assert 0 < len(seen) < 5
    share = f"{len(seen)} of 5"
    assert mlflow.get_run(outcome.run_id).data.tags["start_saw"] == share
    assert f"start_from: before was trained on {share} test classes, by name ({', '.join(seen[:3])}" in text
    assert "test metrics are not those of unseen classes" in text
    (warning,) = [w for w in compare_experiments([outcome.run_id], log=False).comparison.warnings if "began" in w]
    assert warning.endswith(f"it began with a model that was trained on {share} of its test classes")


def test_a_frozen_backbone_and_another_loss_and_method(first, tracked_folder) -> None:
    text = io.StringIO()
    given = [*BASE[:5], "backbone.frozen=true", "loss.name=multi_similarity", "method=[sgar]", *TUNED]
    config = load_recipe("glyphs", [*given, "name=frozen", f"start_from={first.checkpoint}"])
    outcome = run_training(config, Console(file=text, width=1000), here=True)
    assert "start_from: backbone, head, sgar of first\n" in text.getvalue()
    assert outcome.metrics["features/map_at_r"] > 0.5 * first.metrics["test/map_at_r"]
    assert outcome.metrics["untrained/map_at_r"] == pytest.approx(first.metrics["test/map_at_r"], abs=1e-6)


def test_backbone_weights_take_a_runs_backbone(first, tracked_folder) -> None:
    given = ["embedding_dim=16", *TUNED]
    outcome, text = told("name=by-weights", f"backbone.weights={first.checkpoint}", *given)
    assert "backbone.weights: backbone of first; new: head, loss, iaa, sgar, namr" in text
    by_file = train("name=by-file", f"backbone.weights={first.checkpoint}/learner.safetensors", *given)
    assert same_bits(outcome, by_file)
    assert mlflow.get_run(outcome.run_id).data.tags["start_from"] == first.run_id


def test_another_network_is_refused_with_the_way_on(first, tracked_folder: Path) -> None:
    message = refusal(f"start_from={first.run_id}", "embedding_dim=16", "backbone.name=resnet18", "name=refused")
    assert message.startswith(f"start_from={first.run_id}: its network has backbone.name=small (here resnet18), ")
    assert "embedding_dim=32 (here 16); set backbone.name=small embedding_dim=32 to begin with it" in message
    assert refusal("start_from=nothing", "name=refused").startswith("start_from=nothing: not a checkpoint folder, and")
    weights = refusal("backbone.weights=nothing.pt", "name=refused")
    assert weights.startswith("backbone.weights=nothing.pt: not imagenet, none or a file, and as a run: not a")
    (tracked_folder / "empty").mkdir()
    assert "start_from=" in refusal("start_from=empty", "name=refused")
    assert "whole checkpoint" in refusal("start_from=empty", "name=refused")
    assert not (tracked_folder / "runs" / "refused").exists()


def test_the_kind_of_norms_is_that_of_the_start(tracked_folder) -> None:
    network = ["backbone.name=resnet18", "epochs=1", "steps_per_epoch=1", "data.limit_classes=6", "batch.classes=3"]
    scratch = train("name=norms", "backbone.weights=none", *network)
    outcome, text = told("name=norms-on", f"start_from={scratch.checkpoint}", "backbone.weights=imagenet", *network)
    assert read_config(Path(outcome.checkpoint)).backbone.weights == "none"
    assert "backbone.weights=none, as in norms" in text
