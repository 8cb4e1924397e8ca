import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from benchmarks import methods

ROOT = Path(__file__).parents[2]
SMALL = ["data.limit_classes=16", "epochs=1", "steps_per_epoch=1", "batch.classes=4", "embedding_dim=8"]
ONE = ["--samples", "1", "--folds", "1"]
STUDY = {"embedding_dim": 8, "--samples": 1, "--folds": 2}


def study(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "methods.py"), "glyphs", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def cell(*recalls: float, **settings: object) -> dict[str, object]:
    runs = {str(seed): {"test/recall_at_1": r, "test/map_at_r": r / 2} for seed, r in enumerate(recalls)}
    return {"settings": {"loss.name": "triplet", "method": [], **settings}, "runs": runs}


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    cells = {"triplet base": cell(), "triplet alone": cell(0.5, 0.6, 0.7), "triplet iaa": cell(0.51, 0.63, 0.9)}
    cells["triplet sgar"] = cell(**{"sgar.weight": 0.123456})
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"study": STUDY, "cells": cells}))
    return path


@pytest.fixture
def table_of(kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that prints the table of kept results in this process, which has imported what that needs."""

    def table_of(*arguments: str) -> str:
        command = ["methods.py", "glyphs", "--budget", "0", "--results", str(kept), "--losses", "triplet", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        methods.main()
        return capsys.readouterr().out

    return table_of


def test_table_of_kept_results_pairs_the_first_seeds_and_says_what_is_missing(table_of: Callable[..., str]) -> None:
    text = table_of("--seeds", "2")
    rows = [[c.strip() for c in line.split("|")] for line in text.splitlines() if line.startswith("| triplet")]
    assert [row[1:6] for row in rows] == [
        ["triplet", "alone", "2", "55.0 ± 7.1", ""],
        ["triplet", "iaa", "2", "57.0 ± 8.5", "+2.0"],
    ]
    assert rows[1][7] == "" == rows[1][11]  # no p before all methods are there to be adjusted for
    assert "2 points are searched for a base loss, then 1 for each cell" in text and "2 folds, 2 paired seeds" in text
    assert "**Missing:** triplet namr, triplet sgar, triplet all." in text
    assert "- triplet, sgar: `sgar.weight=0.123`" in text
    whole = table_of("--seeds", "3", "--methods", "iaa")
    assert next(line for line in whole.splitlines() if "| iaa" in line).endswith("| 0.250 |")
    assert "the least possible is 0.25)" in whole
    assert "triplet alone (3 of 4 seeds), triplet iaa (3 of 4 seeds)" in table_of("--seeds", "4")


def test_methods_are_told_from_their_base_settings_where_the_loss_alone_has_others(
    kept: Path, table_of: Callable[..., str]
) -> None:
    results = json.loads(kept.read_text())
    results["cells"]["triplet base"] = cell(0.4, 0.3, **{"loss.margin": 0.2})
    kept.write_text(json.dumps(results))
    text = table_of("--seeds", "2", "--methods", "iaa")
    over_alone, over_base = text.split("(*base*)")
    assert "3 of 3 cells are done" in over_alone and "Missing" not in text
    assert "| triplet | iaa | 2 | 57.0 ± 8.5 | +2.0 |" in over_alone and "triplet | base" not in over_alone
    assert "| triplet | base | 2 | 35.0 ± 7.1 |  |" in over_base and "triplet | alone" not in over_base
    assert "| triplet | iaa | 2 | 57.0 ± 8.5 | +22.0 |" in over_base
    assert "- triplet, base: `loss.margin=0.2`" in over_base
    assert "**Missing:** triplet base (2 of 3 seeds)." in table_of("--seeds", "3", "--methods", "iaa")


def test_written_table_has_every_cell_whatever_was_chosen_to_run(
    tmp_path: Path, table_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(methods, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "benchmarks.md"
    page.write_text("before\n<!-- methods glyphs -->\nno more\n<!-- end of methods glyphs -->\nafter\n")
    printed = table_of("--seeds", "2", "--losses", "proxy_anchor", "--write")
    assert "0 of 5 cells are done" in printed and "triplet" not in printed
    text = page.read_text()
    assert text.startswith("before\n<!-- methods glyphs -->\n") and "no more" not in text
    assert text.endswith("\n<!-- end of methods glyphs -->\nafter\n")
    assert "2 of 20 cells are done" in text and "| triplet | iaa | 2 | 57.0" in text

    page.write_text("no marks")
    with pytest.raises(typer.Exit) as ended:
        table_of("--write")
    out, err = capsys.readouterr()
    assert ended.value.exit_code == 2 and not out
    assert err.count("\n") == 1 and "has no lines <!-- methods glyphs -->" in err


def test_files_that_are_not_of_the_study_are_refused_in_a_line(tmp_path: Path, kept: Path) -> None:
    (other := tmp_path / "other.json").write_text('{"cells": 1}')
    for said, *arguments in (
        ("is of another study: ", "--results", str(kept)),
        ("not a file of results", "--results", str(other)),
        ("there is no such file", "--results", "nowhere.json", "--budget", "0"),
    ):
        done = study(tmp_path, *arguments)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert done.stderr.startswith("bad input: ") and said in done.stderr


@pytest.mark.slow
def test_a_study_goes_on_from_its_results_without_its_runs(tmp_path: Path) -> None:
    options = [*SMALL, *ONE, "--losses", "triplet", "--methods", "iaa", "--results", "results.json"]
    first = study(tmp_path, *options, "--seeds", "1")
    assert "2 of 2 cells are done" in first.stdout, first.stderr
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert [*cells] == ["triplet base", "triplet alone", "triplet iaa"]
    assert cells["triplet iaa"]["settings"]["method"] == ["iaa"]
    for key, value in cells["triplet base"]["settings"].items():  # from which the cells went on
        assert key == "method" or key in cells["triplet iaa"]["settings"], (key, value)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(tmp_path / "results.json", elsewhere)
    more = study(elsewhere, *options, "--seeds", "2")
    assert "2 of 2 cells are done" in more.stdout, more.stderr
    names = {folder.parent.name.split("-", 2)[2] for folder in elsewhere.glob("runs/*/*/run.json")}
    assert names == {"triplet-alone-s1", "triplet-iaa-s1"}  # nothing is searched or trained again
    assert json.loads((elsewhere / "results.json").read_text())["cells"]["triplet iaa"]["runs"].keys() == {"0", "1"}
    table = study(elsewhere, *options, "--seeds", "1", "--budget", "0").stdout
    assert table in first.stdout
    longer = study(elsewhere, *(option.replace("epochs=1", "epochs=2") for option in options))
    assert longer.returncode == 2 and "is of another study: epochs=2 (was 1)" in longer.stderr
