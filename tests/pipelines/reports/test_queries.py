"""`dml compare --queries` on real runs: numbers by a naive loop, a page in a browser, and refusals in one line."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.compare.statistics import Group
from pipelines.config.recipe import load_recipe
from pipelines.console import QUIET
from pipelines.reports.queries import pair_runs, telling_queries
from pipelines.runs.outcome import TrainOutcome
from pipelines.runs.train import run_training
from pipelines.tracking.process import SameProcess
from pipelines.tracking.runs import LoggedRun, start_run
from tests.pipelines import browser
from tests.pipelines.conftest import answer, dml, refused, working_in

pytestmark = pytest.mark.usefixtures("cache", "without_ray")
SMALL = ["data.name=folder", "data.image_size=32", "data.validation_fraction=0", "data.loader_processes=0", "workers=1"]
SMALL += ["epochs=1", "steps_per_epoch=3", "batch.classes=3", "batch.images=2", "embedding_dim=8"]


class Trained(NamedTuple):
    """Two configs by two seeds each, by name, and a run on other pictures; where they were trained, and the store."""

    runs: dict[str, TrainOutcome]
    folder: Path
    uri: str


def draw(folder: Path, classes: int) -> Path:
    for name in range(classes):
        rng = np.random.default_rng(name)
        shared = rng.integers(0, 255, (36, 36, 3))
        for number in range(4):
            pixels = 0.3 * shared + 0.7 * rng.integers(0, 255, shared.shape)
            (folder / f"c{name}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"c{name}" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def trained(cache: Path, mlflow_server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("queried")
    draw(folder / "set", 16)
    draw(folder / "others", 8)
    with working_in(folder, mlflow_server.uri), pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.tracking.process.tracking_process", lambda: SameProcess())
        given = {
            f"{method or 'none'}{s}": [f"method=[{method}]", f"seed={s}"] for method in ("", "sgar") for s in (0, 1)
        }
        given = {name: [*keys, "data.root=set"] for name, keys in given.items()} | {"other": ["data.root=others"]}
        runs = {
            name: run_training(
                load_recipe("glyphs", [*SMALL, *keys, f"name={name}", "experiment=queried"]), QUIET, here=True
            )
            for name, keys in given.items()
        }
        yield Trained(runs, folder, mlflow_server.uri)


def naive_gains(base: Path, other: Path) -> dict[str, list[tuple[str, str, float]]]:
    """Metric -> (path, class, gain) of each query."""
    columns = {"test/recall_at_1": "recall_at_1", "test/map_at_r": "average_precision_at_r"}
    before, after = (pq.read_table(file).to_pylist() for file in (base, other))
    assert [row["path"] for row in before] == [row["path"] for row in after]
    return {
        metric: [(a["path"], a["label"], b[column] - a[column]) for a, b in zip(before, after, strict=True)]
        for metric, column in columns.items()
    }


def test_two_runs_as_a_loop_over_their_queries_finds(trained: Trained, tmp_path: Path) -> None:
    one, other = (trained.runs[name] for name in ("none0", "sgar0"))
    for run in (one, other):
        answer("evaluate", run.run_id, "--out", tmp_path / f"{run.name}.parquet")
    gains = naive_gains(tmp_path / "none0.parquet", tmp_path / "sgar0.parquet")
    found = answer("compare", one.run_id, other.run_id, "--queries", "--no-log")
    assert found["baseline"] == "method=[]" and len(found["queries"]["lines"]) == 2
    for line in found["queries"]["lines"]:
        rows = gains[line["metric"]]
        assert line["group"].startswith("method=['sgar']") and line["seeds"] == 1 and line["p_seeds"] is None
        assert line["queries"] == len(rows) == 32 and line["classes"] == 8
        assert line["won"] == sum(gain > 0 for *_, gain in rows) and line["lost"] == sum(gain < 0 for *_, gain in rows)
        logged = other.metrics[line["metric"]] - one.metrics[line["metric"]]
        assert line["gain"] == pytest.approx(sum(gain for *_, gain in rows) / 32) == pytest.approx(logged, abs=1e-6)
    for by_class in found["queries"]["classes"]:
        of_class = [gain for _, label, gain in gains[by_class["metric"]] if label == by_class["label"]]
        assert by_class["queries"] == len(of_class) == 4 and by_class["won"] == sum(gain > 0 for gain in of_class)
        assert by_class["gain"] == pytest.approx(sum(of_class) / 4)
    assert any("one pair of runs" in warning for warning in found["queries"]["warnings"])
    # By their folders, which name the same runs; nothing is evaluated again.
    again = dml("compare", "runs/none0", other.checkpoint, "--queries", "--no-log", "--json")
    assert again.exit_code == 0 and "evaluating" not in again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["queries"] == found["queries"]
    assert "query by query" in again.stderr and "classes that lose and gain most" in again.stderr


def test_seeds_are_paired_on_a_page_that_a_browser_shows(trained: Trained, tmp_path: Path) -> None:
    ids = [run.run_id for name, run in trained.runs.items() if name != "other"]
    found = answer("compare", *ids, "--queries", "--html", tmp_path / "page.html")
    by_metric = {line["metric"]: line for line in found["lines"] if line["gain"] is not None}
    for line in found["queries"]["lines"]:
        assert line["seeds"] == 2 and line["p_seeds"] == by_metric[line["metric"]]["p"]
        assert line["gain"] == pytest.approx(by_metric[line["metric"]]["gain"], abs=1e-6)
        assert not line["differs"]  # two seeds cannot say so
    page = (tmp_path / "page.html").read_text()
    assert mlflow.artifacts.load_text(f"runs:/{found['run_id']}/comparison.html") == page
    assert '<section id="queries"' in page and re.search(r'alt="c\d+/\d\.png"', page)
    assert re.search(r"c\d+/\d\.png: AP@R [+-]\d+ points in the mean over 2 pairs of runs; R@1 won in \d", page)
    addresses = re.findall(r"""(?:src|href)=["']?([^"'\s>]*)|url\(["']?([^"')]*)""", page)
    assert all("".join(address).startswith(("data:", "#")) for address in addresses)
    told = answer("report", found["run_id"], "--out", tmp_path / "report.html", "--no-log")
    assert told["kind"] == "comparison" and "query by query is left out" in (tmp_path / "report.html").read_text()
    with browser.page(400, 800) as opened:
        opened.listen()
        opened.look(360, dark=True)
        opened.go((tmp_path / "page.html").as_uri())
        opened.wait_for("document.querySelectorAll('#queries .query').length > 0 && document.readyState == 'complete'")
        assert opened.run("document.documentElement.scrollWidth") <= 360
        assert opened.run("[...document.querySelectorAll('#queries img')].every(x => x.complete && x.naturalWidth)")
        assert opened.run("[...document.querySelectorAll('#queries .hits img')].every(x => x.alt)")
        assert not opened.told("Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed")


def test_what_cannot_be_compared_is_one_line(trained: Trained, tmp_path: Path) -> None:
    one, other = (trained.runs[name].run_id for name in ("none0", "other"))
    told = refused("compare", one, other, "--queries")
    assert "other and none0 are not tested on the same pictures: 16 queries of 4 classes of the set" in told
    alone = refused("compare", one, trained.runs["none1"].run_id, "--queries")
    assert "--queries: two configs are needed, and the finished runs among these are of 1;" in alone
    tags = {"group": "unfinished", "seed": "0"}
    running = start_run(trained.uri, "queried", "running", {"method": "['iaa']"}, tags, "folder", "d", "s")
    assert "1 runs did not finish and are left out: running" in refused("compare", one, running, "--queries")
    assert "epochs cannot act: runs are compared as they are" in refused("compare", one, "--queries", "epochs=3")
    assert "a run or an experiment is needed" in refused("compare", "--queries", "workers=1")
    assert "neither a run nor an experiment" in refused("compare", "nothing", "--queries")
    copy = shutil.copytree("set", tmp_path / "copy", copy_function=shutil.copyfile)
    elsewhere = refused("compare", one, trained.runs["sgar0"].run_id, "--queries", f"data.root={copy}")
    assert elsewhere.startswith("bad input: --queries, run none0: the pictures there are not those of the training")
    html = ["--queries", "--html", tmp_path / "none" / "page.html"]
    assert "not a file in a folder that can be written to" in refused("compare", one, *html)
    torn = shutil.copytree(trained.runs["sgar0"].checkpoint, tmp_path / "torn")
    (torn / "learner.safetensors").unlink()
    assert "not a whole checkpoint folder" in refused("compare", one, torn, "--queries")


def logged(group: str, seed: str) -> LoggedRun:
    return LoggedRun(group + seed, group + seed, "e", group, seed, "FINISHED", 0, {}, {})


def group_of_seeds(name: str, seeds: str) -> Group:
    return Group(name, name, {}, {seed: logged(name, seed) for seed in seeds})


def test_pairs() -> None:
    base = group_of_seeds("base", "012")
    pairings, warnings = pair_runs(base, [group_of_seeds("a", "103"), group_of_seeds("b", "7")])
    assert [(p.group.label, p.seeds, p.runs) for p in pairings] == [
        ("a", ("1", "0"), [("base1", "a1"), ("base0", "a0")])
    ]
    assert warnings == ["b: shares no seed with the baseline and is left out query by query"]
    (single,), (warning,) = pair_runs(group_of_seeds("base", "0"), [group_of_seeds("b", "7")])
    assert single.runs == [("base0", "b7")] and "seed 7 against the baseline's seed 0" in warning
    with pytest.raises(ValueError, match="no config shares a seed with the baseline, base"):
        pair_runs(base, [group_of_seeds("b", "7")])


def test_each_class_has_one_telling_query() -> None:
    gains, classes = np.array([0.1, 0.9, 0.8, -0.5, 0.3, 0.0]), np.array([0, 1, 1, 2, 3, 4])
    assert telling_queries(gains, classes) == [1, 4, 0]
    assert telling_queries(-gains, classes) == [3]
