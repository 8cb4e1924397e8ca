"""A run, its features, its list of unreadable pictures and its group belong to these pictures, wherever they lie."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines.compare.comparison import compare_experiments
from pipelines.config.recipe import load_recipe
from pipelines.console import QUIET
from pipelines.models.checkpoint import read_data
from pipelines.runs.evaluate import evaluate_run
from pipelines.runs.outcome import TrainOutcome
from pipelines.runs.train import run_training
from tests.pipelines.conftest import answer, refused

pytestmark = pytest.mark.usefixtures("tracked_folder", "tracked_here", "without_ray")
SMALL = ["data.name=folder", "data.image_size=32", "epochs=2", "steps_per_epoch=2", "workers=1"]
SMALL += ["batch.classes=2", "batch.images=4", "backbone.name=small", "backbone.weights=none"]
SMALL += ["data.validation_fraction=0", "data.loader_processes=0"]


def draw(folder: Path, seed: int, alike: float, classes: int = 6) -> Path:
    """Pictures in class folders; those of a class share a part of their pixels."""
    rng = np.random.default_rng(seed)
    for name in range(classes):
        shared = rng.integers(0, 255, (40, 40, 3))
        for number in range(4):
            pixels = alike * shared + (1 - alike) * rng.integers(0, 255, (40, 40, 3))
            (folder / f"c{name}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"c{name}" / f"{number}.png")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return draw(tmp_path / "set", 0, 0.5)


def train(name: str, root: str | Path, *more: str, console: Console = QUIET) -> TrainOutcome:
    return run_training(load_recipe("glyphs", [*SMALL, f"name={name}", f"data.root={root}", *more]), console, here=True)


def interrupt(name: str) -> None:
    """Leave a finished run as one that was stopped after its first epoch."""
    Path("runs", name, "result.json").unlink()
    shutil.rmtree(Path("runs", name, "epoch_00002"))


def add_class(root: Path) -> None:
    shutil.copytree(root / "c0", root / "c9")


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("ended", [True, False])
def test_a_run_over_a_set_that_has_grown_is_refused_before_ray_starts(root: Path, workers: str, ended: bool) -> None:
    name = f"grown-{workers}-{ended}"
    train(name, root, "batch.slices=2")
    if not ended:
        interrupt(name)
    begun = json.loads(Path("runs", name, "run.json").read_text())["data"]
    add_class(root)
    given = [f"data.root={root}", "batch.slices=2", f"workers={workers}"]
    line = refused("train", "glyphs", *SMALL, f"name={name}", *given)
    assert f"name={name} was begun on other pictures in " in line
    assert f"the set was {begun['digest']} (6 classes, 24 pictures) then" in line
    assert "(7 classes, 28 pictures) now; files were added, removed, renamed or labelled anew" in line
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
    shutil.rmtree(root / "c9")
    assert answer("train", "glyphs", *SMALL, f"name={name}", f"data.root={root}", "batch.slices=2")["name"] == name


def test_a_finished_run_knows_its_pictures_wherever_they_lie(root: Path, tmp_path: Path) -> None:
    outcome = train("known", root)
    shutil.copytree(root, tmp_path / "copied with its times")
    root.rename(tmp_path / "moved")
    for place in ("moved", "copied with its times"):
        assert train("known", tmp_path / place) == outcome
    other = draw(tmp_path / "other", 1, 0.5)
    line = refused("train", "glyphs", *SMALL, "name=known", f"data.root={other}")
    assert "names and labels are the same, but not the files' sizes or times" in line and "cp -a" in line


def test_another_config_is_refused_before_anything_is_read(root: Path) -> None:
    train("kept", root)
    line = refused("train", "glyphs", *SMALL, "name=kept", "data.root=/nowhere", "embedding_dim=32", "workers=2")
    assert "name=kept was begun with another config" in line and "embedding_dim=32 (was 128)" in line


def test_a_run_of_an_earlier_version_goes_on_and_its_pictures_are_noted(root: Path) -> None:
    train("early", root)
    path = Path("runs/early/run.json")
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "data"}))
    for ended in (True, False):
        if not ended:
            interrupt("early")
        told = io.StringIO()
        train("early", root, console=Console(file=told, width=200))
        assert "name=early was begun by an earlier version; whether its pictures are still the same" in told.getvalue()
    assert json.loads(path.read_text())["data"]["images"] == 24


def test_digest_is_in_the_run_its_checkpoint_mlflow_and_data_check(root: Path) -> None:
    outcome = train("noted", root)
    known = read_data(Path(outcome.checkpoint))
    run = mlflow.MlflowClient().get_run(outcome.run_id)
    digests = {run.data.tags["data_digest"], run.inputs.dataset_inputs[0].dataset.digest, known.digest}
    digests |= {json.loads(Path("runs/noted/run.json").read_text())["data"]["digest"]}
    assert digests == {answer("data", "check", "folder", f"root={root}")["digest"]}

    told = io.StringIO()
    evaluate_run(outcome.run_id, {}, Console(file=told, width=200))
    assert "are not those of the training" not in told.getvalue()
    add_class(root)
    evaluate_run(outcome.run_id, {}, Console(file=told, width=200))
    assert f"the pictures are not those of the training, which were {known}; they are " in told.getvalue()


def test_seeds_over_other_pictures_are_another_group(tmp_path: Path) -> None:
    runs = []
    for seed, letter in enumerate("aabb"):
        place = draw(tmp_path / letter, ord(letter), 0.5) if seed % 2 == 0 else tmp_path / letter
        runs.append(train(f"{letter}{seed}", place, f"seed={seed}").run_id)
    comparison = compare_experiments(runs, metrics=["test/map_at_r"], log=False).comparison
    assert sorted([*line.values] for line in comparison.lines) == [["0", "1"], ["2", "3"]]
    digests = {mlflow.MlflowClient().get_run(run).data.tags["data_digest"] for run in runs}
    assert {line.group for line in comparison.lines} == {f"data_digest={digest}" for digest in digests}
    assert any("other pictures than the baseline's" in warning for warning in comparison.warnings)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_features_belong_to_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """Equal names in another folder; then other pictures under the same names in the same folder."""

    def raw_features(name: str, root: Path) -> float:
        return train(name, f"{scheme}{root}", "backbone.frozen=true").metrics["features/map_at_r"]

    monkeypatch.setenv("DML_CACHE", str(tmp_path / "cache"))
    easy, hard = draw(tmp_path / "easy", 0, 0.9), draw(tmp_path / "hard", 1, 0.0)
    scores = [raw_features(f"easy{len(scheme)}", easy), raw_features(f"hard{len(scheme)}", hard)]
    for name in (path.relative_to(hard) for path in hard.glob("*/*.png")):
        status = (easy / name).stat()
        shutil.copyfile(hard / name, easy / name)
        os.utime(easy / name, (status.st_atime, status.st_mtime + 1))
    scores.append(raw_features(f"replaced{len(scheme)}", easy))
    assert scores[0] == 1 and scores[1] < 0.8 and scores[2] == scores[1]
    assert len([*(tmp_path / "cache" / "features").iterdir()]) == 3
    assert raw_features(f"again{len(scheme)}", easy) == scores[2]
    assert len([*(tmp_path / "cache" / "features").iterdir()]) == 3


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_list_of_unreadable_pictures_belongs_to_the_pictures(root: Path, scheme: str) -> None:
    def left_out(name: str) -> float:
        return train(name, f"{scheme}{root}", "data.on_bad_image=skip").metrics["data/left_out"]

    whole = (root / "c1" / "1.png").read_bytes()
    (root / "c1" / "1.png").write_bytes(b"\0" * len(whole))
    assert left_out(f"broken{len(scheme)}") == 1
    (root / "c1" / "1.png").write_bytes(whole)
    assert left_out(f"mended{len(scheme)}") == 0
