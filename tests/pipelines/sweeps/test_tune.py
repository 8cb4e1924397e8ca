"""Sweeps: spaces, real trials on a local Ray, one whose driver is killed, one with trials that diverge."""

import io
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import mlflow
import pytest
from ray import tune as ray_tune
from rich.console import Console
from typer.testing import CliRunner

from pipelines.cli import main
from pipelines.config.recipe import load_recipe, with_values
from pipelines.console import QUIET
from pipelines.runs.train import run_training
from pipelines.sweeps import spaces
from pipelines.sweeps import sweep as sweep_module
from pipelines.sweeps.plots import draw_changes, draw_figures
from pipelines.sweeps.records import SweepOptions, Trial
from pipelines.sweeps.spaces import SPACES, config_point, load_space
from pipelines.sweeps.sweep import resume_sweep, start_sweep
from tests.pipelines import browser
from tests.pipelines.sweeps.killed import change_times, kill_sweep

SMALL = ["data.limit_classes=8", "batch.classes=3", "batch.images=4", "epochs=2", "steps_per_epoch=2", "workers=1"]
SMALL += ["method=[sgar]"]


def write_space(folder: Path, text: str) -> str:
    path = folder / "space.py"
    path.write_text(f"from ray import tune\nSPACE = {text}\n")
    return str(path)


def test_spaces_are_joined_and_switch_their_methods_on() -> None:
    config, space = load_space("iaa+namr", load_recipe("glyphs", ["method=[sgar]"]))
    assert config.method == ["iaa", "sgar", "namr"]
    assert {key.partition(".")[0] for key in space} == {"iaa", "namr"}
    _, everything = load_space("all", load_recipe("glyphs", ["loss.name=contrastive"]))
    assert {"optimizer.lr", "loss.pos_margin", "iaa.intensity", "sgar.intensity", "namr.centers"} <= everything.keys()
    assert "loss.alpha" not in everything  # multi_similarity's


@pytest.mark.parametrize("recipe", ["glyphs", "grocery", "grocery-whole"])
@pytest.mark.parametrize("space", [*SPACES, "all"])
def test_every_space_fits_the_recipes(recipe: str, space: str) -> None:
    config, found = load_space(space, load_recipe(recipe, [] if recipe == "glyphs" else ["data.root=somewhere"]))
    assert found and config_point(config, found)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("{'sgar.intensty': tune.uniform(0, 1)}", "sgar.intensty"),
        ("{'sgar.count': tune.uniform(0.5, 1)}", "sgar.count"),
        ("{}", "no SPACE of dotted keys"),
        ("{'sgar.count': 3}", "no SPACE of dotted keys"),
        ("{'iaa.start': tune.choice([0, 1])}", "iaa.start=1: "),
    ],
)
def test_a_space_that_cannot_act_is_refused(tmp_path: Path, space: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_space(write_space(tmp_path, space), load_recipe("glyphs", []))


def test_points_are_the_configs_own_and_then_the_seeds() -> None:
    config, space = load_space("sgar", load_recipe("glyphs", []))
    drawn = spaces.draw_points(space, "random", 6, config)
    assert drawn == spaces.draw_points(space, "random", 6, config)
    assert len(drawn) == 6 and drawn[0] == config_point(config, space)
    assert len({json.dumps(point) for point in drawn}) == 6
    for point in drawn:
        assert all(domain.is_valid(point[key]) for key, domain in space.items())


def test_a_grid_has_the_ends_of_every_range() -> None:
    space = {
        "sgar.intensity": ray_tune.loguniform(0.01, 1.0),
        "sgar.count": ray_tune.randint(3, 8),
        "sgar.max_gap": ray_tune.choice([None, 0.1]),
    }
    grid = spaces.draw_points(space, "grid", 3, load_recipe("glyphs", []))
    assert len(grid) == 3 * 3 * 2
    assert sorted({point["sgar.intensity"] for point in grid}) == pytest.approx([0.01, 0.1, 1.0])
    assert {point["sgar.count"] for point in grid} == {3, 5, 7}


@pytest.mark.parametrize(("keys", "count"), [(1, 1), (1, 2), (3, 12)])
def test_plots_of_any_size_can_be_drawn(keys: int, count: int) -> None:
    config, space = load_space("sgar", load_recipe("glyphs", []))
    space = dict([*space.items()][:keys])
    drawn = spaces.draw_points(space, "random", count, config)
    trials = [Trial(f"t{i}", point, i / count, 3, "finished", "") for i, point in enumerate(drawn)]
    failed = Trial("failed", {**drawn[0], "changes": {"2": drawn[-1]}}, None, 2, "failed", "not finite")
    made = draw_figures(space, [*trials, failed])
    assert {*made} == {"parallel_coordinates", "slices"} | ({"importance"} if count > 8 else set())
    trials.append(Trial("went on", {**drawn[0], "changes": {"2": drawn[-1]}}, 0.5, 3, "finished", ""))
    for figure in [*made.values(), draw_changes(trials)]:
        figure.savefig(io.BytesIO(), bbox_inches="tight")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "glyphs"], "--space NAME is needed"),
        (["tune", "glyphs", "--space", "sga"], "'sga' is none of base, iaa, sgar, namr, all, FILE.py"),
        (["tune", "glyphs", "--space", "sgar", "--search", "bayes"], "--search bayes: optuna, random or grid"),
        (["tune", "glyphs", "--space", "sgar", "--schedule", "hyperband"], "hyperband: asha, none or pbt"),
        (["tune", "glyphs", "--space", "sgar", "--schedule", "pbt", "--folds", "2"], "pbt: it goes with"),
        (["tune", "glyphs", "--space", "sgar", "--schedule", "pbt", "epochs=1"], "leave nothing to change"),
        (["tune", "glyphs", "--space", "sgar", "--schedule", "pbt", "changes.2.loss.alpha=3"], "cannot begin with"),
        (["tune", "glyphs", "--space", "sgar", "data.validation_fraction=0"], "chooses by validation classes"),
        (["tune", "--resume", "nothing"], "--resume nothing: no sweep of that name"),
        (["tune", "glyphs", "--resume", "nothing"], "only storage=FOLDER may go with it"),
    ],
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(main.app, arguments)
    assert found.exit_code == 2, found.output
    assert message in " ".join(found.stderr.split())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_sweep_goes_on_to_the_winner_of_an_undisturbed_one(tracked_folder: Path) -> None:
    """Two folds a trial, over HTTP; one trial of each sweep diverges."""
    space = "{'optimizer.lr': tune.choice([1e-3, 1e30, 3e-3]), 'sgar.intensity': tune.loguniform(0.02, 0.5)}"
    asked = ["glyphs", "--space", write_space(tracked_folder, space), "--search", "random", "--schedule", "none"]
    asked += ["--samples", "4", "--folds", "2", "--final-seeds", "1", "--concurrent", "1", *SMALL]
    killed = tracked_folder / "runs" / "killed"
    arguments = [*asked, "name=killed"]
    kill_sweep(arguments, tracked_folder, lambda: len(change_times(killed, "result.json")) >= 3)  # in the second trial
    done = change_times(killed, "result.json")
    assert 3 <= len(done) < 6

    resumed = CliRunner().invoke(main.app, ["tune", "--resume", "killed", "--json"])
    assert resumed.exit_code == 0, resumed.output
    whole = CliRunner().invoke(main.app, ["tune", *asked, "name=whole", "--json"])
    assert whole.exit_code == 0, whole.output
    one, other = (json.loads(found.stdout.splitlines()[-1]) for found in (resumed, whole))

    # No trial twice, none lost, the same winner with the same scores, and the same test.
    assert {path: path.stat().st_mtime_ns for path in done} == done
    trials = [{json.dumps(t["point"]): (t["score"], t["ended"]) for t in found["trials"]} for found in (one, other)]
    assert len(trials[0]) == 4 and trials[0] == trials[1]
    assert one["winner"] == other["winner"]
    assert one["score"] == max(score for score, _ in trials[0].values() if score is not None)
    tested = [{(line["group"], line["metric"]): line["values"] for line in found["tested"]} for found in (one, other)]
    assert tested[0] == tested[1] and ("default", "test/map_at_r") in tested[0]
    for trial in other["trials"]:
        diverges = trial["point"]["optimizer.lr"] == 1e30
        assert trial["ended"] == ("failed" if diverges else "finished")
        assert ("not finite" in trial["reason"]) == diverges
        assert diverges or trial["epochs"] == 4
    assert any(trial["ended"] == "failed" for trial in other["trials"])

    client = mlflow.MlflowClient()
    for found in (one, other):
        parent = client.get_run(found["run_id"])
        assert parent.info.status == "FINISHED" and parent.data.params["space.sgar.intensity"].startswith("LogUniform")
        kept = {file.path for file in client.list_artifacts(found["run_id"])}
        assert {"best.yaml", "comparison.html", "parallel_coordinates.png", "slices.png"} <= kept
        children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{found['run_id']}'")
        by_name = {run.info.run_name: run for run in children}
        assert len(children) == len(by_name) == 3 * 2 + 1 + len(tested[0]) // 2
        for trial in found["trials"]:
            if trial["ended"] == "failed":
                assert by_name[f"{trial['name']}-f0"].info.status == "FAILED"
                continue
            bests = []
            for run in (by_name[f"{trial['name']}-f{fold}"] for fold in range(2)):
                history = client.get_metric_history(run.info.run_id, "val/map_at_r")
                assert run.info.status == "FINISHED" and sorted(m.step for m in history) == [1, 2]
                assert "test/map_at_r" not in run.data.metrics
                bests.append(max(m.value for m in history))
            assert trial["score"] == pytest.approx(sum(bests) / 2)
        assert by_name["default-s1"].data.metrics["test/map_at_r"] == tested[0]["default", "test/map_at_r"]["1"]

    # What is left: a recipe, a champion, and no checkpoints of trials.
    name, _, version = other["model"].rpartition("/")
    assert client.get_model_version_by_alias(name, "champion").version == version
    winner = load_recipe(other["recipe"], [])
    assert winner.sgar is not None and winner.sgar.intensity == other["winner"]["sgar.intensity"]
    assert [*killed.glob("default-s1/epoch_*")] and not [*killed.glob("t*/epoch_*")]

    again = CliRunner().invoke(main.app, ["tune", "--resume", "killed", "--json"])
    assert json.loads(again.stdout.splitlines()[-1]) == one
    taken = CliRunner().invoke(main.app, ["tune", *asked, "name=killed"])
    assert taken.exit_code == 2 and "name=killed is taken" in taken.stderr


def test_a_sweep_from_python_goes_on_where_its_plots_and_mlflow_fail(
    tracked_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("nothing to draw with")

    monkeypatch.setattr(sweep_module, "draw_figures", fail)
    monkeypatch.setattr(sweep_module, "end_interrupted_runs", fail)
    values = {**dict(text.split("=") for text in SMALL if "workers" not in text), "name": "plain", "method": ["sgar"]}
    values |= {key: int(value) for key, value in values.items() if str(value).isdigit()}
    options = SweepOptions(write_space(tracked_folder, "{'optimizer.lr': tune.choice([1e-3])}"), 1, final_seeds=1)
    console = Console(file=io.StringIO(), width=1000)
    outcome = start_sweep("glyphs", values, options, console)
    assert [trial.ended for trial in outcome.trials] == ["finished"] and outcome.model
    begun = json.loads(Path("runs/plain/sweep.json").read_text())
    assert begun["config"]["workers"] == 1 and begun["options"]["search"] == "optuna"
    log = Path("runs/plain/logs/driver.log").resolve()
    for problem in ("plots of the sweep are missing in MLflow", "MLflow may still show interrupted trials as running"):
        assert f"{problem}: nothing to draw with ({log} has the traceback)" in console.file.getvalue()
    assert log.read_text().count("OSError: nothing to draw with") == 2 and "Traceback" in log.read_text()
    assert resume_sweep("plain") == outcome

    experiment = mlflow.get_experiment_by_name("glyphs").experiment_id
    members = f"tags.`mlflow.parentRunId` = '{outcome.run_id}'"
    digests = {run.data.tags["data_digest"] for run in mlflow.MlflowClient().search_runs([experiment], members)}
    assert digests == {begun["data"]["digest"]}
    Path("runs/plain/outcome.json").unlink()
    begun["data"] |= {"digest": "of other pictures", "listing": "other", "classes": 7}
    Path("runs/plain/sweep.json").write_text(json.dumps(begun))
    with pytest.raises(ValueError, match=r"--resume plain was begun on other pictures in .*\(7 classes"):
        resume_sweep("plain")


def test_without_final_seeds_a_sweep_only_searches(tracked_folder: Path) -> None:
    """Trainings of one epoch and of three compete, where the config has two."""
    asked = ["tune", "glyphs", "--space", write_space(tracked_folder, "{'epochs': tune.choice([1, 3])}")]
    asked += ["--search", "grid", "--samples", "2", "--final-seeds", "0"]
    found = CliRunner().invoke(main.app, [*asked, *SMALL, "name=only"])
    assert found.exit_code == 0, found.output
    assert "nothing was tested (--final-seeds 0)" in found.stdout and "baseline" not in found.stdout
    folder = Path("runs/only")
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["tested"] == [] and (folder / "best.yaml").exists()
    ended = {trial["point"]["epochs"]: (trial["epochs"], trial["ended"]) for trial in outcome["trials"]}
    assert ended[1] == (1, "finished") and ended[3] in ((3, "finished"), (1, "stopped"), (2, "stopped"))
    assert not [*folder.glob("default-*")] and not [*folder.glob("*/epoch_*")]
    assert outcome["model"] is None
    page = CliRunner().invoke(main.app, ["report", str(folder), "--out", "sweep.html"])
    assert page.exit_code == 0 and "Nothing was tested" in Path("sweep.html").read_text()


SPACE = {
    "sgar.intensity": "tune.loguniform(0.02, 0.5)",
    "sgar.count": "tune.randint(3, 8)",
    "loss.base": "tune.uniform(0.3, 0.7)",
    "optimizer.lr": "tune.loguniform(1e-3, 1e-2)",
}
POPULATION = [*(a for a in SMALL if "epochs" not in a), "epochs=3", "name=pbt", "precision=float64"]


@pytest.fixture(scope="module")
def population(tracked_folder: Path) -> dict[str, Any]:
    """What a sweep with settings that change printed."""
    text = "{" + ", ".join(f"'{key}': {domain}" for key, domain in SPACE.items()) + "}"
    asked = ["tune", "glyphs", "--space", write_space(tracked_folder, text), "--schedule", "pbt", "--samples", "4"]
    found = CliRunner().invoke(main.app, [*asked, "--final-seeds", "1", "--concurrent", "1", *POPULATION, "--json"])
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout.splitlines()[-1])


def test_a_population_changes_settings_and_its_recipes_repeat_what_it_found(
    tracked_folder: Path, population: dict[str, Any]
) -> None:
    outcome, client = population, mlflow.MlflowClient()
    assert [trial["ended"] for trial in outcome["trials"]] == ["finished"] * 4
    assert "changes.png" in {file.path for file in client.list_artifacts(outcome["run_id"])}
    assert not [*(tracked_folder / "runs" / "pbt").rglob("t*/epoch_*")]
    went_on = next(trial for trial in outcome["trials"] if "changes" in trial["point"])
    for values in went_on["point"]["changes"].values():
        assert "optimizer.lr" not in values and {*values} <= {*SPACE}
        assert 0.02 <= values.get("sgar.intensity", 0.1) <= 0.5 and 3 <= values.get("sgar.count", 3) <= 7

    # From the start by these settings, what the trial had by going on from others' checkpoints.
    config = load_recipe("glyphs", POPULATION)
    again = run_training(with_values(config, went_on["point"] | {"name": "again"}), QUIET, here=True)
    experiment, parent = client.get_experiment_by_name("glyphs").experiment_id, f"'{outcome['run_id']}'"
    name = f"run_name = '{went_on['name']}' AND tags.`mlflow.parentRunId` = {parent}"
    (trial,) = client.search_runs([experiment], name)
    for key in ("train/step_loss", "val/map_at_r"):
        one, other = (client.get_metric_history(run, key) for run in (again.run_id, trial.info.run_id))
        assert sorted((m.step, m.value) for m in one) == sorted((m.step, m.value) for m in other), key
    assert again.metrics["val/best_map_at_r"] == went_on["score"]


def test_mlflows_page_shows_a_sweep_with_its_trials_and_compares_their_curves(
    tracked_folder: Path, mlflow_server, population: dict[str, Any]
) -> None:
    client = mlflow.MlflowClient()
    sweep = client.get_run(population["run_id"])
    experiment, names = sweep.info.experiment_id, [trial["name"] for trial in population["trials"][:2]]
    found = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{sweep.info.run_id}'")
    runs = [run.info.run_id for run in found if run.info.run_name in names]
    with browser.page() as page:
        page.go(f"{mlflow_server.uri}/#/experiments/{experiment}/runs")
        row = "[...document.querySelectorAll('[role=row]')].find(row => row.innerText.includes('pbt'))"
        page.wait_for(f"Boolean({row}?.querySelector('button'))")
        assert not page.run(f"document.body.innerText.includes('{names[0]}')")
        page.run(f"{row}.querySelector('button').click()")
        for name in names:
            page.wait_for(f"document.body.innerText.includes('{name}')")
        page.keep(tracked_folder / "sweep.png")

        asked = {"runs": runs, "experiments": [experiment], "metric": "val/map_at_r"}
        asked |= {"plot_metric_keys": ["val/map_at_r"], "plot_layout": {"autosize": True}}
        query = "&".join(f"{key}={quote(json.dumps(value))}" for key, value in asked.items())
        page.go(f"{mlflow_server.uri}/#/metric?{query}&x_axis=step")
        page.wait_for("document.querySelectorAll('.scatterlayer .trace').length >= 2")
        assert all(page.run(f"document.body.innerText.includes('{name} (val/map_at_r)')") for name in names)
        page.keep(tracked_folder / "curves.png")
