import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["data.limit_classes=16", "epochs=1", "steps_per_epoch=1", "batch.classes=4", "embedding_dim=8"]
ONE = ["--samples", "1", "--folds", "1"]
STUDY = {"recipe": "glyphs", "values": {"embedding_dim": 8}, "samples": 1, "folds": 1}


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


def test_table_of_kept_results_pairs_the_first_seeds_and_says_what_is_missing(tmp_path: Path, kept: Path) -> None:
    options = ["embedding_dim=8", "--budget", "0", "--losses", "triplet", "--results", str(kept)]
    text = study(tmp_path, *options, *ONE, "--seeds", "2").stdout
    rows = [[c.strip() for c in line.split("|")] for line in text.splitlines() if line.startswith("| triplet")]
    assert [row[1:6] for row in rows] == [
        ["triplet", "alone", "2", "55.0 ± 7.1", ""],
        ["triplet", "iaa", "2", "57.0 ± 8.5", "+2.0"],
    ]
    assert "**Missing:** triplet namr, triplet sgar, triplet all." in text
    assert "- triplet, sgar: `sgar.weight=0.123`" in text
    assert (
        "triplet alone (3 of 4 seeds), triplet iaa (3 of 4 seeds)"
        in study(tmp_path, *options, *ONE, "--seeds", "4").stdout
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["embedding_dim=16", *ONE], "is of the study"),
        (["embedding_dim=8", "--samples", "2", "--folds", "1"], "is of the study"),
    ],
)
def test_results_of_another_study_are_refused(tmp_path: Path, kept: Path, arguments: list[str], said: str) -> None:
    done = study(tmp_path, *arguments, "--results", str(kept), "--budget", "0")
    assert done.returncode != 0 and len(done.stderr.strip().splitlines()) == 1
    assert said in done.stderr and str(kept) in done.stderr


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (other := tmp_path / "other.json").write_text('{"cells": 1}')
    done = study(tmp_path, "--results", str(other), "--budget", "0")
    assert done.returncode != 0 and len(done.stderr.strip().splitlines()) == 1 and str(other) in done.stderr


@pytest.mark.slow
def test_a_study_goes_on_from_its_results_without_its_runs(tmp_path: Path) -> None:
    options = [*SMALL, *ONE, "--losses", "triplet", "--methods", "iaa", "--results", "results.json"]
    first = study(tmp_path, *options, "--seeds", "1")
    assert "2 of 2 cells are done" in first.stdout, first.stderr
    results = (tmp_path / "results.json").read_text()
    cells = json.loads(results)["cells"]
    assert [*cells] == ["triplet base", "triplet alone", "triplet iaa"]
    assert cells["triplet iaa"]["settings"]["method"] == ["iaa"]
    for key, value in cells["triplet base"]["settings"].items():  # from which the cells went on
        assert key == "method" or key in cells["triplet iaa"]["settings"], (key, value)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(tmp_path / "results.json", elsewhere)
    more = study(elsewhere, *options, "--seeds", "2")
    assert "2 of 2 cells are done" in more.stdout, more.stderr
    names = {folder.parent.name for folder in elsewhere.glob("runs/*/*/run.json")}
    assert names == {"glyphs-triplet-alone-s1", "glyphs-triplet-iaa-s1"}  # nothing is searched or trained again
    assert json.loads((elsewhere / "results.json").read_text())["cells"]["triplet iaa"]["runs"].keys() == {"0", "1"}
    assert (
        study(elsewhere, *options, "--seeds", "1", "--budget", "0").stdout
        == first.stdout.partition("glyphs: ")[1] + first.stdout.partition("glyphs: ")[2]
    )
