"""`dml data check`, and runs that leave out what cannot be read."""

import io
import json
from pathlib import Path

import mlflow
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from pipelines.cli import main
from pipelines.config.recipe import load_recipe
from pipelines.runs.train import run_training

pytestmark = pytest.mark.usefixtures("tracked_folder", "without_ray")
QUIET = Console(file=io.StringIO())
SMALL = ["data.name=folder", "data.image_size=32", "data.augment=crop", "epochs=1", "steps_per_epoch=2", "workers=1"]
SMALL += ["batch.classes=3", "batch.images=4", "backbone.name=small", "backbone.weights=none"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in range(8):
        (tmp_path / "set" / f"class {name}").mkdir(parents=True)
        for number in range(5):
            noise = rng.integers(0, 255, (40, 50, 3)).astype(np.uint8)
            Image.fromarray(noise).save(tmp_path / "set" / f"class {name}" / f"{number}.jpg")
    return tmp_path / "set"


def check(*arguments: str) -> tuple[int, dict]:
    found = CliRunner().invoke(main.app, ["data", "check", *arguments, "--json"])
    return found.exit_code, json.loads(found.stdout.splitlines()[-1])


def test_nothing_wrong(root: Path) -> None:
    code, report = check("folder", f"root={root}")
    assert code == 0 and report["problems"] == [] and report["unreadable"] == {}
    assert report["counts"] == {"train_classes": 4, "train_images": 20, "test_classes": 4, "test_images": 20}


def test_everything_wrong_is_named(root: Path) -> None:
    (root / "class 3" / "1.jpg").write_bytes(b"")
    (root / "class 5" / "2.jpg").write_bytes((root / "class 5" / "2.jpg").read_bytes()[:500])
    (root / "lonely").mkdir()
    everyone = [root / f"class {i}" / "0.jpg" for i in range(8)]
    (root / "lonely" / "0.jpg").write_bytes(everyone[0].read_bytes())
    for path in everyone[1:]:  # whatever the split, some lie in train and some in test
        path.write_bytes(everyone[0].read_bytes())
    code, report = check("folder", f"root={root}")
    assert code == 1 and set(report["unreadable"]) == {"class 3/1.jpg", "class 5/2.jpg"}
    assert report["unreadable"]["class 3/1.jpg"] == "empty file" and report["in_train_and_test"]
    told = "\n".join(report["problems"])
    assert "1 classes have one image alone, lonely first" in told and "the same picture in train and test" in told
    code, report = check("folder", f"root={root}", "--no-pictures")
    assert code == 1 and len(report["problems"]) == 1 and "unreadable" not in report


def test_wrong_counts_of_a_benchmark(tmp_path: Path) -> None:
    top = tmp_path / "CUB_200_2011"
    top.mkdir()
    (top / "image_class_labels.txt").write_text("".join(f"{i} {i}\n" for i in range(1, 201)))
    (top / "images.txt").write_text("".join(f"{i} {i:03d}.Bird/a.jpg\n" for i in range(1, 201)))
    code, report = check("cub", f"root={tmp_path}", "--no-pictures")
    assert code == 1 and "train_images: 100, but the published set has 5864" in report["problems"]
    assert report["counts"]["train_classes"] == report["expected"]["train_classes"] == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cubb", "root=x"], "data.name=cubb"),
        (["cub"], "root is needed for data.name=cub"),
        (["cub", "root=x", "rot=y"], "unknown key data.rot"),
        (["cub", "root=nowhere"], "not CUB-200-2011, there is no CUB_200_2011/images.txt; data.download=true fetches"),
        (["inshop", "root=x", "download=true"], "download cannot act on data.name=inshop"),
        (["folder", "root=s3://bucket/set"], "s3fs"),
        (["table", "root=x"], "table is needed for data.name=table"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    found = CliRunner().invoke(main.app, ["data", "check", *arguments])
    assert found.exit_code == 2 and message in found.stderr and found.stderr.count("\n") == 1


def test_skip_leaves_out_what_cannot_be_read_and_says_so(root: Path) -> None:
    for number in range(3):
        (root / "class 2" / f"{number}.jpg").write_bytes(b"no picture")
    given = [*SMALL, f"data.root={root}", "data.validation_fraction=0"]
    config = load_recipe("glyphs", [*given, "data.on_bad_image=skip", "name=skipping"])
    outcome = run_training(config, QUIET, here=True)
    assert outcome.metrics["data/left_out"] == 3
    client = mlflow.MlflowClient()
    assert client.get_run(outcome.run_id).data.metrics["data/left_out"] == 3
    left_out = mlflow.artifacts.load_text(f"runs:/{outcome.run_id}/left_out.txt").split("\n")
    assert left_out == [f"class 2/{number}.jpg" for number in range(3)]
    assert run_training(config, QUIET) == outcome
    from pipelines.cluster.launch import RunFailed

    with pytest.raises(RunFailed, match="unreadable picture"):
        run_training(load_recipe("glyphs", [*given, "name=failing", "steps_per_epoch=20"]), QUIET, here=True)
