"""Sweeps: spaces, real trials on a local Ray, one whose driver is killed, one with trials that diverge."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import psutil
import pytest
from ray import tune as ray_tune
from rich.console import Console
from typer.testing import CliRunner

from pipelines import tune
from pipelines.cli import app
from pipelines.recipe import load

SMALL = ["data.limit_classes=8", "batch.classes=3", "batch.images=4", "epochs=2", "steps_per_epoch=2", "workers=1"]
ASKED = ["--space", "base+sgar", "--search", "random", "--schedule", "none", "--samples", "3", "--final-seeds", "1"]
QUIET = Console(file=io.StringIO())


def write_space(folder: Path, text: str) -> str:
    path = folder / "space.py"
    path.write_text(f"from ray import tune\nSPACE = {text}\n")
    return str(path)


def test_spaces_are_joined_and_switch_their_methods_on() -> None:
    config, space = tune.space_of("iaa+namr", load("glyphs", []))
    assert config.method == ["iaa", "sgar", "namr"]
    assert {key.partition(".")[0] for key in space} == {"iaa", "namr"}
    _, everything = tune.space_of("all", load("glyphs", ["loss.name=contrastive"]))
    assert {"optimizer.lr", "loss.pos_margin", "iaa.intensity", "sgar.intensity", "namr.centers"} <= everything.keys()
    assert "loss.alpha" not in everything  # multi_similarity's


@pytest.mark.parametrize("recipe", ["glyphs", "grocery"])
@pytest.mark.parametrize("space", [*tune.SPACES, "all"])
def test_every_space_fits_the_recipes(recipe: str, space: str) -> None:
    config, found = tune.space_of(space, load(recipe, ["data.root=somewhere"] if recipe == "grocery" else []))
    assert found and tune.own_point(config, found)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("{'sgar.intensty': tune.uniform(0, 1)}", "sgar.intensty"),
        ("{'sgar.count': tune.uniform(0.5, 1)}", "sgar.count"),
        ("{}", "no SPACE of dotted keys"),
        ("{'sgar.count': 3}", "no SPACE of dotted keys"),
        ("{'iaa.start_epoch': tune.choice([0, 99])}", "iaa.start_epoch=99 cannot act"),
    ],
)
def test_a_space_that_cannot_act_is_refused(tmp_path: Path, space: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tune.space_of(write_space(tmp_path, space), load("glyphs", []))


def test_points_are_the_configs_own_and_then_the_seeds() -> None:
    config, space = tune.space_of("sgar", load("glyphs", []))
    drawn = tune.points(space, tune.Options("sgar", 6, search="random"), config)
    assert drawn == tune.points(space, tune.Options("sgar", 6, search="random"), config)
    assert len(drawn) == 6 and drawn[0] == tune.own_point(config, space)
    assert len({json.dumps(point) for point in drawn}) == 6
    for point in drawn:
        assert all(domain.is_valid(point[key]) for key, domain in space.items())


def test_a_grid_has_the_ends_of_every_range() -> None:
    space = {
        "sgar.intensity": ray_tune.loguniform(0.01, 1.0),
        "sgar.count": ray_tune.randint(3, 8),
        "sgar.max_gap": ray_tune.choice([None, 0.1]),
    }
    grid = tune.points(space, tune.Options("sgar", 3, search="grid"), load("glyphs", []))
    assert len(grid) == 3 * 3 * 2
    assert sorted({point["sgar.intensity"] for point in grid}) == pytest.approx([0.01, 0.1, 1.0])
    assert {point["sgar.count"] for point in grid} == {3, 5, 7}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "glyphs"], "--space NAME is needed"),
        (["tune", "glyphs", "--space", "sga"], "'sga' is none of base, iaa, sgar, namr, all, FILE.py"),
        (["tune", "glyphs", "--space", "sgar", "--search", "bayes"], "--search bayes: optuna, random or grid"),
        (["tune", "glyphs", "--space", "sgar", "--schedule", "pbt"], "--schedule pbt: asha or none"),
        (["tune", "glyphs", "--space", "sgar", "data.validation_fraction=0"], "chooses by validation classes"),
        (["tune", "--resume", "nothing"], "--resume nothing: no sweep of that name"),
        (["tune", "glyphs", "--resume", "nothing"], "only storage=FOLDER may go with it"),
    ],
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 2, found.output
    assert message in " ".join(found.stderr.split())


def finished_trials(folder: Path) -> list[Path]:
    return sorted(folder.glob("t*/result.json"))


@pytest.mark.timeout(900)
def test_a_killed_sweep_goes_on_to_the_winner_of_an_undisturbed_one(
    tracked_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over HTTP; both sweeps use one server."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    killed = tracked_folder / "runs" / "killed"
    command = [sys.executable, "-m", "pipelines.cli", "tune", "glyphs", *ASKED, "--concurrent", "1", *SMALL]
    with open(tracked_folder / "log", "ab") as log:
        process = subprocess.Popen(
            [*command, "name=killed"], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + 240
    while not finished_trials(killed):
        assert process.poll() is None and time.monotonic() < deadline, (tracked_folder / "log").read_text()[-2000:]
        time.sleep(0.05)
    everyone = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    for child in everyone:
        if child.is_running():
            child.kill()
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in finished_trials(killed)}
    assert 1 <= len(done) < 3

    resumed = CliRunner().invoke(app, ["tune", "--resume", "killed", "--json"])
    assert resumed.exit_code == 0, resumed.output
    whole = CliRunner().invoke(app, ["tune", "glyphs", *ASKED, *SMALL, "name=whole", "--json"])
    assert whole.exit_code == 0, whole.output
    one, other = (json.loads(found.stdout.splitlines()[-1]) for found in (resumed, whole))

    # No trial twice, none lost, and the same winner with the same scores.
    assert {path: path.stat().st_mtime_ns for path in done} == done
    scores = [{json.dumps(t["point"], sort_keys=True): t["score"] for t in found["trials"]} for found in (one, other)]
    assert len(scores[0]) == 3 and scores[0] == scores[1]
    assert all(trial["ended"] == "finished" for found in (one, other) for trial in found["trials"])
    assert one["winner"] == other["winner"] and one["score"] == max(scores[0].values())
    tested = [{(line["group"], line["metric"]): line["values"] for line in found["tested"]} for found in (one, other)]
    assert tested[0] == tested[1] and ("default", "test/map_at_r") in tested[0]

    client = mlflow.MlflowClient()
    for found in (one, other):
        parent = client.get_run(found["run_id"])
        query = f"tags.`mlflow.parentRunId` = '{found['run_id']}'"
        children = client.search_runs([parent.info.experiment_id], query)
        assert parent.info.status == "FINISHED" and {run.info.status for run in children} == {"FINISHED"}
        names = [run.info.run_name for run in children]
        assert len(names) == len(set(names)) and sum(name.startswith("t") for name in names) == 3
        assert {name.rpartition("-")[0] for name in names if not name.startswith("t")} <= {"winner", "default"}
        for run in children:
            history = client.get_metric_history(run.info.run_id, "train/loss")
            assert [m.step for m in sorted(history, key=lambda m: m.step)] == [1, 2]
            assert ("test/map_at_r" in run.data.metrics) == (not run.info.run_name.startswith("t"))
        kept = {file.path for file in client.list_artifacts(found["run_id"])}
        assert {"best.yaml", "comparison.html", "parallel_coordinates.png", "slices.png"} <= kept
        assert parent.data.params["space.sgar.intensity"].startswith("LogUniform (0.02, 0.5)")
    name, _, version = other["model"].rpartition("/")
    assert client.get_model_version_by_alias(name, "champion").version == version
    winner = load(other["recipe"], [])
    assert winner.sgar is not None and winner.sgar.intensity == other["winner"]["sgar.intensity"]
    assert not [*killed.glob("t*/epoch_*")] and [*killed.glob("default-s1/epoch_*")]

    again = CliRunner().invoke(app, ["tune", "--resume", "killed", "--json"])
    assert json.loads(again.stdout.splitlines()[-1]) == one
    taken = CliRunner().invoke(app, ["tune", "glyphs", *ASKED, *SMALL, "name=killed"])
    assert taken.exit_code == 2 and "name=killed is taken" in taken.stderr


@pytest.mark.usefixtures("tracked_folder")
def test_a_trial_that_diverges_fails_with_its_reason_and_the_sweep_goes_on(tmp_path: Path) -> None:
    space = write_space(tmp_path, "{'optimizer.lr': tune.choice([1e-3, 1e30]), 'sgar.count': tune.choice([3])}")
    config = load("glyphs", [*SMALL, "name=diverging"])
    options = tune.Options(space, 1, search="grid", schedule="asha", folds=2, final_seeds=1)
    outcome = tune.begin(config, options, QUIET)
    by_rate = {trial["point"]["optimizer.lr"]: trial for trial in outcome.trials}
    assert by_rate[1e30]["ended"] == "failed" and "not finite" in by_rate[1e30]["reason"]
    assert by_rate[1e-3]["ended"] == "finished" and by_rate[1e-3]["epochs"] == 4
    assert outcome.winner["optimizer.lr"] == 1e-3
    client = mlflow.MlflowClient()
    folds = [
        [m.value for m in client.get_metric_history(run.info.run_id, "val/map_at_r")]
        for run in client.search_runs(
            [client.get_run(outcome.run_id).info.experiment_id],
            f"tags.`mlflow.parentRunId` = '{outcome.run_id}' and tags.trial = '{by_rate[1e-3]['name']}'",
        )
    ]
    assert len(folds) == 2
    assert outcome.score == pytest.approx(sum(max(values) for values in folds) / 2)
