"""Where a run is recorded: `experiment`, MLFLOW_EXPERIMENT_NAME, or the set's name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import mlflow
import pytest

from pipelines.config.recipe import load_recipe
from pipelines.config.schema import Config
from pipelines.console import QUIET
from pipelines.runs.record import with_experiment
from pipelines.runs.train import run_training
from pipelines.tracking.server import connect, experiment_id

TINY = ["data.limit_classes=12", "batch.classes=4", "batch.images=2", "epochs=1", "steps_per_epoch=1", "method=[]"]


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def experiment(assignments: list[str], begun: Mapping[str, Any] | None = None) -> str | None:
    return with_experiment(load_recipe("glyphs", [*assignments, "name=x"]), begun).experiment


def test_the_key_wins_over_the_variable_and_that_over_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert experiment([]) == "glyphs" and experiment(["experiment=team/shoes 2024"]) == "team/shoes 2024"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the shell")
    assert experiment([]) == "of the shell" and experiment(["experiment=7"]) == "7"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", " space")
    with pytest.raises(ValueError, match=r"^MLFLOW_EXPERIMENT_NAME=' space': no - or space"):
        experiment([])


@pytest.mark.parametrize(
    ("name", "hint"), [("MLFLOW_RUN_ID", "name=NAME again"), ("MLFLOW_EXPERIMENT_ID", "experiment=NAME")]
)
def test_variables_that_would_not_be_heeded_are_refused(name: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "12")
    with pytest.raises(ValueError, match=rf"^{name}=12: .*unset .*{hint}|^{name}=12: .*{hint}"):
        experiment([])


def test_a_run_that_goes_on_stays_in_its_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = load_recipe("glyphs", ["experiment=first"]).to_dict()
    assert experiment([], begun) == experiment(["experiment=first"], begun) == "first"
    with pytest.raises(ValueError, match=r"^experiment=second: name=x was begun in experiment=first, and stays there"):
        experiment(["experiment=second"], begun)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "second")
    with pytest.raises(ValueError, match=r"^MLFLOW_EXPERIMENT_NAME=second: name=x was begun in experiment=first"):
        experiment([], begun)
    earlier_version = Config().to_dict()
    assert "experiment" not in earlier_version and earlier_version["data"]["name"] == "glyphs"
    with pytest.raises(ValueError, match="begun in experiment=glyphs"):
        experiment([], earlier_version)


def test_a_training_is_recorded_there(tracked_folder: Path) -> None:
    config = load_recipe("glyphs", [*TINY, "name=elsewhere", "experiment=team/shoes"])
    outcome = run_training(config, QUIET, here=True)
    client = mlflow.MlflowClient()
    run = client.get_run(outcome.run_id)
    assert outcome.experiment == "team/shoes" == client.get_experiment(run.info.experiment_id).name
    assert run.inputs.dataset_inputs[0].dataset.name == "glyphs"
    assert run_training(config, QUIET, here=True).run_id == outcome.run_id
    with pytest.raises(ValueError, match="begun in experiment=team/shoes"):
        run_training(config.model_copy(update={"experiment": "glyphs"}), QUIET, here=True)


def test_beside_a_database_each_experiment_has_a_folder_below_mlartifacts(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client, folders = connect(uri), set[Path]()
    names = ["..", ".", "glyphs", "a/../../b", "/a", "a b", "a%2Fb", "a/b", "a#b", "é" * 200, "x" * 500]
    for name in names:
        location = client.get_experiment(experiment_id(client, uri, name)).artifact_location
        folder = Path(unquote(urlparse(location).path))
        assert folder.parent == tmp_path / "mlartifacts" and len(folder.name.encode()) < 256
        folders.add(folder)
    assert len(folders) == len(names) and tmp_path / "mlartifacts" / "glyphs" in folders
