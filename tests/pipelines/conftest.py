"""The same training by one worker and by two, which several tests look at."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from rich.console import Console

from pipelines import jobs
from pipelines.recipe import load

QUIET = Console(file=io.StringIO())
# Validation, with a checkpoint, after each of six epochs; the variation is estimated before the first and the fourth.
EXACT = ["glyphs", "data.limit_classes=12", "batch.classes=4", "batch.images=4", "epochs=6", "steps_per_epoch=8"]
EXACT += ["precision=float64", "method=[iaa,sgar,namr]", "iaa.start_epoch=0", "iaa.update_every=3"]


@pytest.fixture(scope="module")
def tracked_folder(local_ray: None, mlflow_server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder of the module's own, whose runs go to the server."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("work")
    os.chdir(folder)
    os.environ["MLFLOW_TRACKING_URI"] = mlflow_server.uri
    mlflow.set_tracking_uri(mlflow_server.uri)
    yield folder
    os.chdir(before)
    del os.environ["MLFLOW_TRACKING_URI"]


@pytest.fixture(scope="session")
def exact(local_ray: None, mlflow_server, tmp_path_factory: pytest.TempPathFactory) -> dict[int, jobs.Outcome]:
    """Number of workers -> outcome, in float64 and with all methods; one worker is this process itself."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("exact")
    os.environ["MLFLOW_TRACKING_URI"] = mlflow_server.uri
    os.chdir(folder)
    mlflow.set_tracking_uri(mlflow_server.uri)
    try:
        return {
            n: jobs.train(load(EXACT[0], [*EXACT[1:], f"workers={n}", f"name=exact{n}"]), QUIET, here=n == 1)
            for n in (1, 2)
        }
    finally:
        os.chdir(before)
        del os.environ["MLFLOW_TRACKING_URI"]
