"""The same training by one worker and by two, pictures embedded by it, and the command line, for several tests."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import mlflow
import pytest
from torchvision.transforms.functional import to_pil_image
from typer.testing import CliRunner

from pipelines import console
from pipelines.cli import main
from pipelines.config.recipe import load_recipe
from pipelines.config.sections import Data
from pipelines.console import QUIET
from pipelines.data.sets import load_collection
from pipelines.runs.outcome import TrainOutcome
from pipelines.runs.train import run_training
from pipelines.tracking.process import SameProcess
from tests.sharing import make_once

console.QUIET_SECONDS = 60.0  # refusals are told in one line, however slow the machine is
# Validation, with a checkpoint, after each of six epochs; the variation is estimated before the first and the fourth.
EXACT = ["glyphs", "data.limit_classes=12", "batch.classes=4", "batch.images=4", "epochs=6", "steps_per_epoch=8"]
EXACT += ["optimizer.lr=3e-3", "precision=float64", "method=[iaa,sgar,namr]", "iaa.start=0", "iaa.update_every=3"]

ROWS = 300  # more than a block


def dml(*arguments: str | Path):
    return CliRunner().invoke(main.app, [str(argument) for argument in arguments])


def answer(*arguments: str | Path) -> dict[str, Any]:
    found = dml(*arguments, "--json")
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout.splitlines()[-1])


def refused(*arguments: str | Path) -> str:
    found = dml(*arguments)
    assert found.exit_code == 2, found.output
    assert found.stderr.startswith("bad input: ") and found.stderr.count("\n") == 1
    return found.stderr


@contextmanager
def working_in(folder: Path, uri: str) -> Iterator[Path]:
    """A working folder whose runs go to a server."""
    before, uri_before = Path.cwd(), os.environ.get("MLFLOW_TRACKING_URI")
    os.chdir(folder)
    os.environ["MLFLOW_TRACKING_URI"] = uri
    mlflow.set_tracking_uri(uri)
    try:
        yield folder
    finally:
        os.chdir(before)
        del os.environ["MLFLOW_TRACKING_URI"]
        if uri_before:  # a fixture of the session that is made in the middle of a module
            os.environ["MLFLOW_TRACKING_URI"] = uri_before


@pytest.fixture
def tracked_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of this process speaks to MLflow from it, too, and not from another, which imports it for seconds."""
    monkeypatch.setattr("pipelines.tracking.process.tracking_process", lambda: nullcontext(SameProcess()))


@pytest.fixture(scope="module")
def tracked_folder(cache: Path, mlflow_server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of the module's own."""
    with working_in(tmp_path_factory.mktemp("work"), mlflow_server.uri) as folder:
        yield folder


@pytest.fixture(scope="session")
def exact(cache: Path, mlflow_server, together: Path) -> dict[int, TrainOutcome]:
    """Number of workers -> outcome, in float64 and with all methods; one worker is this process itself."""

    def train() -> dict[int, TrainOutcome]:
        (together / "exact").mkdir()
        with working_in(together / "exact", mlflow_server.uri):
            return {
                n: run_training(
                    load_recipe(EXACT[0], [*EXACT[1:], f"workers={n}", f"name=exact{n}"]), QUIET, here=n == 1
                )
                for n in (1, 2)
            }

    return make_once(together, "exact", train)


@pytest.fixture(scope="session")
def pictures(cache: Path, together: Path) -> Path:
    """Characters in class folders, some beside them, and a file that is no picture."""

    def draw() -> Path:
        images, folder = load_collection(Data()).images, together / "searched" / "pictures"
        for number in range(ROWS):
            label = images.class_names[images.labels[number]]
            name = f"{label}/{number:03d}.png" if number % 50 else f"{number:03d}.png"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(images.picture(number, 32)).save(folder / name)
        (folder / name).with_name("broken.png").write_bytes(b"no picture")
        return folder

    return make_once(together, "pictures", draw)


@pytest.fixture(scope="session")
def vectors(exact, pictures: Path, mlflow_server, together: Path) -> Path:
    """Embedded by two workers."""

    def embed() -> Path:
        out = pictures.parent / "out" / "vectors.parquet"
        with working_in(pictures.parent, mlflow_server.uri):
            asked = ["embed", exact[2].run_id, "--images", pictures, "--out", out]
            found = answer(*asked, "workers=2", "data.on_bad_image=skip")
        assert (found["rows"], found["dim"], found["structure"], found["left_out"]) == (ROWS, 128, True, 1)
        assert found["file"] == str(out) and [*out.parent.iterdir()] == [out]
        return out

    return make_once(together, "vectors", embed)


@pytest.fixture(scope="session")
def index(vectors: Path, mlflow_server, together: Path) -> Path:
    """Of the approximate kind with cells, and structure-aware."""

    def build() -> Path:
        out = vectors.parents[1] / "index"
        with working_in(out.parent, mlflow_server.uri):
            answer("index", "build", vectors, "--out", out, "--kind", "ivf", "--structure")
        return out

    return make_once(together, "index", build)
