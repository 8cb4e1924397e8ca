"""Reports: what is on the page is what the run has, and a real browser shows it."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlflow
import pytest

from pipelines.compare import wording
from pipelines.compare.statistics import Comparison
from pipelines.compare.wording import METRIC_COLUMNS, RANKINGS, Line
from pipelines.config.recipe import load_recipe
from pipelines.data.sets import identify
from pipelines.models.checkpoint import read_config
from pipelines.reports import report
from pipelines.reports.plots import draw_curves
from pipelines.reports.sweep_page import render_sweep
from pipelines.runs.with_model import TrainedModel
from pipelines.sweeps import spaces
from pipelines.sweeps.records import Trial
from pipelines.sweeps.spaces import load_space
from tests.pipelines import browser
from tests.pipelines.conftest import answer, refused

pytestmark = pytest.mark.usefixtures("tracked_folder", "without_ray")


@pytest.fixture(scope="module")
def page(exact, tracked_folder: Path) -> Path:
    """Of a run with IAA, SGAR and NAMR."""
    out = tracked_folder / "run.html"
    made = answer("report", exact[1].run_id, "--out", out)
    assert made == made | {"report": str(out), "kind": "run", "run_id": exact[1].run_id, "logged": True}
    assert made["bytes"] == out.stat().st_size < 10e6
    return out


def cells(page: str, caption: str) -> list[list[str]]:
    """Of the table of that caption, without tags."""
    body = page.split(f"<caption>{caption}")[1].split("<tbody>")[1].split("</tbody>")[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in body.split("<tr")[1:]]
    return [[re.sub(r"<.*?>|\s+", " ", cell).strip() for cell in row] for row in rows]


def test_numbers_are_the_runs(exact, page: Path) -> None:
    text, metrics = page.read_text(), exact[1].metrics
    assert mlflow.artifacts.load_text(f"runs:/{exact[1].run_id}/report.html") == text
    shown = cells(text, "Retrieval on test classes, in percent")
    assert [row[0] for row in shown] == [*RANKINGS.values()]
    for prefix, row in zip(RANKINGS, shown, strict=True):
        assert row[1:] == [f"{100 * metrics[f'{prefix}/{key}']:.1f}" for key in METRIC_COLUMNS]
    config = read_config(Path(exact[1].checkpoint))
    assert cells(text, "Config") == [[key, str(value).replace("'", "&#39;")] for key, value in config.flat().items()]
    assert ["run", exact[1].run_id] in cells(text, "Where and by what")
    model = TrainedModel(Path(exact[1].checkpoint), config, config, identify(config.data), ())
    history = report._read_longest_history(model)
    assert len(history) == config.epochs  # of the last checkpoint, whichever was best
    drawn = draw_curves(history, int(metrics["best_epoch"]))
    assert {"train/loss", "train/base", "train/sgar_rank", "train/namr_rank", "train/lr"} < {*drawn}
    assert {"train/gradient_norm", "val/recall_at_1", "val/map_at_r"} < {*drawn}
    told = f"train/loss from {history[0]['metrics']['train/loss']:.4g} to {history[-1]['metrics']['train/loss']:.4g}"
    assert all(str(drawing) in text for drawing in drawn.values()) and told in text


NAMED = {
    "table": "e.caption.innerText && e.querySelector('thead th[scope=col]')",
    "tbody tr": "e.querySelector('th[scope=row]')",
    "img": "e.hasAttribute('alt')",
    "figure svg": "e.getAttribute('aria-label') && e.getAttribute('role') === 'img'",
    ".map circle": "e.getAttribute('aria-label') && e.getAttribute('role') === 'option'",
    "[tabindex]": "e.getAttribute('aria-label')",
}


def test_in_a_browser(page: Path) -> None:
    with browser.page(400, 800) as opened:
        opened.listen()
        for dark in (False, True):
            opened.look(400, dark)
            opened.go(f"file://{page}")
            opened.wait_for("document.readyState === 'complete'")
            assert opened.run("document.documentElement.scrollWidth") <= 400
            inks = opened.run("getComputedStyle(document.body).color + getComputedStyle(document.body).backgroundColor")
            assert inks == ("rgb(236, 239, 241)rgb(19, 22, 24)" if dark else "rgb(26, 28, 30)rgb(247, 247, 244)")
            line = "getComputedStyle(document.querySelector('#curves path[style*=\"--one\"]')).stroke"
            assert opened.run(line) == ("rgb(98, 197, 232)" if dark else "rgb(0, 105, 140)")
            opened.keep(page.with_name("dark.png" if dark else "light.png"))

        # Tab reaches the map as one stop, from where arrows go on; each point tells its class and shows its picture.
        assert opened.run("document.querySelectorAll('.map [tabindex=\"0\"]').length") == 1
        here = "document.activeElement.getAttribute('aria-label')"
        for _ in range(60):
            opened.press("Tab")
            if opened.run("document.activeElement.matches('.map circle')"):
                break
        visited = [opened.run(here)]
        for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "End"):
            opened.press(key)
            assert opened.run("document.activeElement.matches('.map circle[aria-selected=true]')"), key
            visited.append(opened.run(here))
            assert opened.run("document.querySelector('.tip').innerText.trim()") == visited[-1]
            assert opened.run("document.querySelector('.tip img').src").startswith("data:image/webp")
        assert all(visited) and len({*visited}) > 1
        opened.press("Escape")
        assert opened.run("document.querySelector('.tip').hidden")

        # What a screen reader goes by.
        levels = opened.run("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
        assert levels.count(1) == 1 == levels[0] and all(after - before <= 1 for before, after in pairwise(levels))
        for landmark in ("header", "nav[aria-label]", "main", "footer"):
            assert opened.run(f"document.querySelectorAll('body > {landmark}').length") == 1
        for every, has in NAMED.items():
            assert opened.run(f"[...document.querySelectorAll('{every}')].every(e => {has})"), every
        ids = opened.run("[...document.querySelectorAll('section [id], main, section')].map(e => e.id)")
        assert len({*ids}) == len(ids)
        urls = {told["request"]["url"].partition(":")[0] for told in opened.told("Network.requestWillBeSent")}
        assert urls <= {"file", "data"}
        assert not opened.told("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")


SMALL = ["data.limit_classes=8", "batch.classes=3", "batch.images=4", "epochs=1", "steps_per_epoch=2", "workers=1"]


@pytest.fixture(scope="module")
def sweep(tracked_folder: Path) -> dict[str, Any]:
    """What a sweep of two points printed."""
    asked = ["--space", "sgar", "--samples", "2", "--final-seeds", "1", "--schedule", "none", "--concurrent", "1"]
    return answer("tune", "glyphs", *asked, *SMALL, "name=swept")


def test_of_a_sweep(sweep: dict[str, Any], tracked_folder: Path) -> None:
    made = answer("report", sweep["run_id"], "--out", "sweep.html")
    assert (made["kind"], made["run_id"]) == ("sweep", sweep["run_id"])
    text = Path(made["report"]).read_text()
    assert mlflow.artifacts.load_text(f"runs:/{sweep['run_id']}/report.html") == text
    rows = cells(text, "Trials, the best first")
    assert [row[:3] for row in rows] == [
        [trial["name"], f"{trial['score']:.4f}", "1"] for trial in sorted(sweep["trials"], key=lambda t: -t["score"])
    ]
    lines = [[*wording.format_line(Line(**line))] for line in sweep["tested"]]
    assert cells(text, "Test metrics by config") == [[" ".join(cell.split()) for cell in line] for line in lines]
    assert "sgar.intensity against val/map_at_r of 2 trials" in text and "takes 8 different scores" in text
    by_folder = answer("report", "runs/swept", "--out", "folder.html", "--no-log")
    assert by_folder["logged"] is False and Path(by_folder["report"]).stat().st_size == made["bytes"]
    Path("runs/swept/outcome.json").rename("runs/swept/outcome")
    assert "the sweep has not finished; dml tune --resume swept goes on" in refused(
        "report", "runs/swept", "--out", "x.html"
    )
    Path("runs/swept/outcome").rename("runs/swept/outcome.json")


def test_of_a_comparison(sweep: dict[str, Any], tracked_folder: Path) -> None:
    client = mlflow.MlflowClient()
    query = f"run_name = 'default-s1' AND tags.`mlflow.parentRunId` = '{sweep['run_id']}'"
    experiment = client.get_experiment_by_name("glyphs").experiment_id
    finals = [run.info.run_id for run in client.search_runs([experiment], query)]
    compared = answer("compare", *finals)
    made = answer("report", compared["run_id"], "--out", "one.html")
    assert (made["kind"], made["run_id"], made["logged"]) == ("comparison", compared["run_id"], True)
    lines = [[*wording.format_line(Line(**line))] for line in compared["lines"]]
    one = Path("one.html").read_text()
    assert cells(one, "Test metrics by config") == lines and all(doubt in one for doubt in compared["warnings"])
    anew = answer("report", *finals, finals[0], "--out", "two.html")
    assert cells(Path("two.html").read_text(), "Test metrics by config") == lines
    again = answer("report", anew["run_id"], "--out", "three.html", "--no-log")
    assert cells(Path("three.html").read_text(), "Test metrics by config") == lines and again["kind"] == "comparison"


def test_sweeps_of_any_size_and_sort_in_a_browser(tracked_folder: Path) -> None:
    config, space = load_space("sgar", load_recipe("glyphs", []))
    drawn = spaces.draw_points(space, "random", 12, config)
    trials = [Trial(f"t{i}", point, i / 12, 3, "finished", "") for i, point in enumerate(drawn)]
    failed = Trial("failed <b>", drawn[0], None, 2, "failed", "not finite")
    line = Line("<i>winner</i>", "test/map_at_r", {"1": 0.4, "2": 0.5}, 0.45, 0.05, (0.4, 0.5))
    compared = Comparison("default", ["few"], [line, line._replace(group="a long label " * 12)])
    changed = Trial("went on", {**drawn[0], "changes": {"2": drawn[-1]}}, 0.5, 3, "finished", "")
    given = {"one": trials[:1], "many": [*trials, failed], "population": [*trials, changed]}
    with browser.page(400, 800) as opened:
        opened.listen()
        for name, some in given.items():
            text = render_sweep(name, some, space, compared, {}, "")
            file = tracked_folder / f"{name}.html"
            file.write_text(text)
            assert ("Importance of each setting for the score (fANOVA): sgar" in text) == (name == "many")
            assert ("Settings that changed on the way" in text) == (name == "population")
            assert "<i>winner" not in text and "<b>" not in text
            opened.look(400, dark=True)
            opened.go(f"file://{file}")
            opened.wait_for("document.readyState === 'complete'")
            assert opened.run("document.documentElement.scrollWidth") <= 400
        assert not opened.told("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")


def test_bad_input(exact, sweep: dict[str, Any], tracked_folder: Path) -> None:
    run, out = ["report", exact[1].checkpoint], ["--out", "new.html"]
    assert "neither a run nor an experiment" in refused("report", "nothing", *out)
    assert "not a whole checkpoint folder" in refused("report", ".", *out)
    assert "a run, a sweep, a comparison or an experiment is needed" in refused("report", "workers=1", *out)
    assert "not the name of a file that ends with .html" in refused(*run, "--out", "new")
    assert "no folder" in refused(*run, "--out", "nowhere/new.html")
    assert "epochs cannot act: a report is of the run as it is" in refused(*run, *out, "epochs=3")
    assert "use_gpu cannot act on a report of a sweep" in refused("report", sweep["run_id"], *out, "use_gpu=false")
    assert not Path("new.html").exists()
