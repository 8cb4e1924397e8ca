"""Sweeps by Optuna and of a population, killed in their middle: they go on, and train nothing twice."""

import json
from pathlib import Path
from typing import Any

import mlflow
import pytest
from typer.testing import CliRunner

from pipelines.cli import main
from pipelines.config.recipe import load_recipe, with_values
from pipelines.console import QUIET
from pipelines.runs.train import run_training
from tests.pipelines.sweeps.killed import change_times, kill_sweep
from tests.pipelines.sweeps.test_tune import POPULATION, SMALL, SPACE, write_space

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def resume(name: str) -> dict[str, Any]:
    resumed = CliRunner().invoke(main.app, ["tune", "--resume", name, "--json"])
    assert resumed.exit_code == 0, resumed.output
    return json.loads(resumed.stdout.splitlines()[-1])


def assert_each_trained_once(outcome: dict[str, Any], epochs: int) -> None:
    """Each trial has a run in MLflow, with each epoch once, and nothing is taken for running."""
    client = mlflow.MlflowClient()
    experiment = client.get_run(outcome["run_id"]).info.experiment_id
    runs = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{outcome['run_id']}'")
    by_name = {run.info.run_name: run for run in runs}
    assert len(by_name) == len(runs) and not any(run.info.status == "RUNNING" for run in runs)
    assert len({trial["name"] for trial in outcome["trials"]}) == len(outcome["trials"])
    for trial in outcome["trials"]:
        run = by_name[trial["name"]]
        assert trial["ended"] == "finished" and trial["epochs"] == epochs and run.info.status == "FINISHED"
        history = client.get_metric_history(run.info.run_id, "val/map_at_r")
        assert sorted(m.step for m in history) == [*range(1, epochs + 1)]
        assert trial["score"] == pytest.approx(max(m.value for m in history))
        steps = [m.step for m in client.get_metric_history(run.info.run_id, "train/step_loss")]
        assert sorted(steps) == [*range(2 * epochs)]


def test_a_search_by_optuna_goes_on(tracked_folder: Path) -> None:
    space = write_space(tracked_folder, "{'optimizer.lr': tune.loguniform(1e-3, 1e-2)}")
    options = ["--space", space, "--search", "optuna", "--schedule", "none", "--samples", "5"]
    options += ["--final-seeds", "1", "--concurrent", "1"]
    sweep = tracked_folder / "runs" / "drawn"
    kill_sweep(
        ["glyphs", *options, *SMALL, "name=drawn"],
        tracked_folder,
        lambda: len(change_times(sweep, "result.json")) == 2 and len(change_times(sweep, "run.json")) == 3,
    )
    done = change_times(sweep, "result.json")
    outcome = resume("drawn")
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert len(outcome["trials"]) == 5 and {path.parent.name for path in done} <= {t["name"] for t in outcome["trials"]}
    assert len({trial["point"]["optimizer.lr"] for trial in outcome["trials"]}) == 5
    assert {path.parent.name for path in change_times(sweep, "run.json")} == {t["name"] for t in outcome["trials"]}
    assert_each_trained_once(outcome, 2)
    lines = [line for path in sweep.glob("tune_search/*/result.json") for line in path.read_text().splitlines()]
    assert len({json.loads(line)["pid"] for line in lines}) <= 2  # one before the kill, one after it
    assert outcome["winner"] == max(outcome["trials"], key=lambda trial: trial["score"])["point"]


def test_a_population_goes_on(tracked_folder: Path) -> None:
    space = write_space(tracked_folder, "{" + ", ".join(f"'{key}': {domain}" for key, domain in SPACE.items()) + "}")
    options = ["--space", space, "--schedule", "pbt", "--samples", "4", "--final-seeds", "1", "--concurrent", "1"]
    keys = [*(key for key in POPULATION if not key.startswith("name=")), "name=turned"]
    sweep = tracked_folder / "runs" / "turned"

    def has_exploited() -> bool:
        """Whether a trial has gone on from another's checkpoint, and Ray Tune has kept that it did."""
        runs = {path: json.loads(path.read_text()) for path in sweep.glob("t*/run.json")}
        begun = [path.stat().st_mtime for path, run in runs.items() if run["config"]["changes"]]
        kept = [path.stat().st_mtime for path in sweep.glob("tune_search/experiment_state-*.json")]
        return bool(begun and kept) and max(kept) > min(begun)

    kill_sweep(["glyphs", *options, *keys], tracked_folder, has_exploited)
    done = change_times(sweep, "result.json")
    assert len(done) < 4
    outcome = resume("turned")
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert len(outcome["trials"]) == 4
    assert any("changes" in trial["point"] for trial in outcome["trials"])
    assert_each_trained_once(outcome, 3)

    # A trial that was killed on its way came to what a training from the start by its settings comes to.
    config = load_recipe("glyphs", keys)
    for number, trial in enumerate(outcome["trials"]):
        if "changes" in trial["point"]:
            again = run_training(with_values(config, trial["point"] | {"name": f"again{number}"}), QUIET, here=True)
            assert again.metrics["val/best_map_at_r"] == trial["score"]
