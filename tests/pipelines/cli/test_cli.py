"""As a user types it: help, lists, wrong input. Nothing here reaches a worker."""

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from pipelines.cli import main
from pipelines.tracking.server import connect, prepare_run


def dml(*arguments: str):
    return CliRunner().invoke(main.app, list(arguments))


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_ray: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


COMMANDS = ["train", "evaluate", "recipes", "config", "ui", "data", "data list"]
COMMANDS += ["embed", "index", "index build", "index search", "report", "export"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    found = dml(*command.split(), "--help")
    assert found.exit_code == 0 and "Example: dml " in found.stdout.replace("\n", " ")


def test_lists() -> None:
    papers = {f"{data}-{m}" for data in ("cub", "cars", "sop", "inshop", "vehicleid") for m in ("iaa", "sgar", "namr")}
    assert set(json.loads(dml("recipes", "--json").stdout)) == {"glyphs", "grocery", "grocery-whole", *papers}
    assert {"glyphs", "folder", "table", "cub", "grocery"} < set(json.loads(dml("data", "list", "--json").stdout))
    assert "glyphs" in dml("recipes").stdout and "grocery" in dml("data", "list").stdout
    assert json.loads(dml("config", "glyphs", "seed=3", "--json").stdout)["seed"] == 3


def tree(root: Path, classes: int) -> Path:
    for name in range(classes):
        (root / str(name)).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / str(name) / "a.png")
    return root


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["batch.images=8", "batch.classes=2000"], "batch.classes=2000: the training set has only 1202 classes"),
        (["batch.images=1"], "batch.images=1: loss.name=multi_similarity compares images of one class"),
        (["use_gpu=true"], "use_gpu=true: each of workers=1 needs a GPU"),
        (["workers=5", "batch.slices=4"], "batch.slices=4 parts of the global batch of 128"),
        (["data.name=folder", "data.root=nowhere"], "nowhere: no such folder"),
        (["data.name=folder", "data.root=one"], "1 classes give"),
        (["data.name=folder", "data.root=few"], "batch.classes=32: the training set has only 4 classes"),
        (["storage=file/below"], "storage="),
        (["backbone.name=resnet5000"], "backbone.name=resnet5000"),
        (["backbone.weights=imagenet"], "backbone.name=small has no pre-trained weights"),
        (["loss.alpha=strong"], "loss"),
        (["epochs=2", "wrong"], "wrong"),
    ],
)
def test_bad_input_stops_before_any_worker(
    tmp_path: Path, arguments: list[str], message: str, tracked_here: None
) -> None:
    tree(tmp_path / "one", 1)
    tree(tmp_path / "few", 10)
    (tmp_path / "file").write_text("")
    found = dml("train", *arguments)
    assert found.exit_code == 2, found.output
    assert message in found.stderr and found.stderr.count("\n") == 1 and found.stderr.startswith("bad input: ")
    assert not list(tmp_path.glob("runs/*"))


def test_a_server_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    found = dml("train")
    assert found.exit_code == 2 and "MLflow at http://127.0.0.1:9 does not answer" in found.stderr
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("workers", [1, 2])
def test_an_experiment_that_was_deleted_is_told_before_ray_starts(
    tmp_path: Path, workers: int, tracked_here: None
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    prepare_run(uri, "glyphs")
    connect(uri).delete_experiment("1")
    found = dml("train", f"workers={workers}")
    assert found.exit_code == 2 and found.stderr.count("\n") == 1
    assert found.stderr.startswith("bad input: experiment glyphs is deleted in MLflow")
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("run", ["nothing", "models:/none@champion", "torn"])
def test_evaluate_of_what_is_not_there(tmp_path: Path, run: str) -> None:
    (tmp_path / "torn").mkdir()
    found = dml("evaluate", run)
    assert found.exit_code == 2 and run in found.stderr and found.stderr.count("\n") == 1
