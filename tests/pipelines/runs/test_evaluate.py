"""`dml evaluate` on other pictures than those of the training, and its file of queries."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.config.recipe import load_recipe
from pipelines.console import QUIET
from pipelines.runs.outcome import TrainOutcome
from pipelines.runs.train import run_training
from tests.pipelines.conftest import answer, dml, refused


def draw(path: Path, seed: int, noise: int) -> None:
    """A picture of a class, which `seed` stands for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pattern = np.kron(np.random.default_rng(seed).integers(0, 255, (4, 4, 3)), np.ones((8, 8, 1)))
    noisy = pattern + np.random.default_rng(1000 * seed + noise).normal(0, 40, pattern.shape)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path)


def draw_folder(root: Path, classes: list[str], images: int, seed: int = 0) -> Path:
    for number, name in enumerate(classes):
        for image in range(images):
            draw(root / name / f"{image}.png", seed + number, image)
    return root


@pytest.fixture(scope="module")
def trained(tracked_folder: Path) -> TrainOutcome:
    """On folders, with test classes that are named."""
    root = draw_folder(tracked_folder / "trained", [f"t{n}" for n in range(8)], 6)
    given = ["data.name=folder", f"data.root={root}", "data.test_classes=[t0,t1]", "data.image_size=32", "epochs=1"]
    given += ["data.augment=none", "batch.classes=4", "batch.images=2", "steps_per_epoch=2", "method=[]", "workers=1"]
    given += ["embedding_dim=8", "data.loader_processes=0", "precision=float64", "name=trained"]
    return run_training(load_recipe("glyphs", given), QUIET, here=True)


def test_every_picture_of_another_folder_is_tested(trained: TrainOutcome, tmp_path: Path) -> None:
    """Six classes: fewer than a batch has, and nothing is asked of training. Any number of workers writes one file."""
    root = draw_folder(tmp_path / "new", [f"n{n}" for n in range(6)], 50, seed=100)
    draw(root / "single" / "0.png", 200, 0)
    run = ["evaluate", trained.run_id, "data.name=folder", f"data.root={root}", "metrics=[precision_at_3,mrr]"]
    found = answer(*run, "workers=1", "--out", tmp_path / "queries.parquet")
    assert found["tested"] == {
        "pictures": 301,
        "classes": 7,
        "queries": 301,
        "gallery": 301,
        "queries_without_match": 1,
    }
    rows = pq.read_table(tmp_path / "queries.parquet").to_pandas()
    assert len(rows) == 301 and found["out"] == str(tmp_path / "queries.parquet")
    assert rows.recall_at_1.mean() == pytest.approx(found["metrics"]["test/recall_at_1"])
    assert rows.average_precision_at_r.mean() == pytest.approx(found["metrics"]["test/map_at_r"])
    assert found["metrics"]["test/queries_without_match"] == 1 and found["metrics"]["test/queries"] == 301
    lonely = rows[rows.label == "single"].iloc[0]
    assert np.isnan(lonely.recall_at_1) and lonely.matches == 0 and (rows.matches == 49).sum() == 300
    for row in rows.itertuples():
        assert len(row.neighbor_paths) == len(row.neighbor_labels) == len(row.neighbor_similarities) == 10
        assert row.path not in row.neighbor_paths and (np.diff(row.neighbor_similarities) <= 0).all()
        assert [path.split("/")[0] for path in row.neighbor_paths] == list(row.neighbor_labels)
        assert np.isnan(row.recall_at_1) or row.recall_at_1 == (row.neighbor_labels[0] == row.label)
    told = dml(*run, "workers=1")
    assert "testing 301 pictures of 7 classes: 301 queries, each against all others; 1 queries have no" in told.stderr
    assert "without match" in told.stdout and "precision_at_3" in told.stdout and "mrr" in told.stdout


def test_a_table_that_is_all_test_with_roles_and_cameras(trained: TrainOutcome, tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "new", [f"n{n}" for n in range(4)], 6, seed=100)
    lines = [["path", "label", "split", "role", "camera"]]
    roles = ["query", "gallery", "query+gallery", "gallery", "gallery", "query"]
    for name in range(4):
        lines += [[f"n{name}/{i}.png", f"n{name}", "test", roles[i], f"c{i % 2}"] for i in range(6)]
    with open(root / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows(lines)
    run = ["evaluate", trained.run_id, "data.name=table", f"data.table={root}/table.csv", "workers=1"]
    found = answer(*run, "--out", tmp_path / "queries.parquet")
    assert found["tested"] == {"pictures": 24, "classes": 4, "queries": 12, "gallery": 16, "queries_without_match": 0}
    for row in pq.read_table(tmp_path / "queries.parquet").to_pylist():
        image = int(row["path"][-5])
        seen = {path for path in row["neighbor_paths"] if path.split("/")[0] == row["label"]}
        shown = {f"{row['label']}/{i}.png" for i in (1, 2, 3, 4) if i % 2 != image % 2}
        assert seen <= shown and row["matches"] == 2 and row["path"] not in row["neighbor_paths"]
    assert 0 < found["metrics"]["test/recall_at_1"] <= 1


def test_the_runs_own_set_is_tested_on_its_own_classes(trained: TrainOutcome) -> None:
    found = answer("evaluate", trained.run_id, "workers=1")
    assert found["tested"]["classes"] == 2 and found["tested"]["queries"] == 12
    assert found["metrics"]["test/map_at_r"] == trained.metrics["test/map_at_r"]


def test_a_share_or_classes_that_are_named_are_tested_alone(trained: TrainOutcome, tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "new", [f"n{n}" for n in range(6)], 3, seed=100)
    run = ["evaluate", trained.run_id, f"data.root={root}", "workers=1"]
    assert answer(*run, "data.test_classes=[n1,n3]")["tested"]["pictures"] == 6
    assert answer(*run, "data.test_fraction=0.5")["tested"]["pictures"] == 9
    assert answer(*run)["tested"]["pictures"] == 18


def test_classes_of_the_training_are_named(trained: TrainOutcome, tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "new", ["t5", "t6", "n1"], 3)
    told = dml("evaluate", trained.run_id, f"data.root={root}", "workers=1")
    assert told.exit_code == 0 and "classes are called like classes of the training" in told.stderr


def test_what_cannot_be_tested_or_written_is_one_line(trained: TrainOutcome, tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "single", [f"n{n}" for n in range(6)], 1)
    run = ["evaluate", trained.run_id, f"data.root={root}"]
    assert "no query has a match: none of the 6 queries of 6 classes has another picture of its class" in refused(*run)
    own = ["evaluate", trained.run_id, "--out"]
    assert "not a name that ends with .parquet; pandas reads it" in refused(*own, tmp_path / "queries.csv")
    (tmp_path / "there.parquet").write_text("")
    assert "cannot be written to" in refused(*own, tmp_path / "there.parquet" / "queries.parquet")
    assert "it exists already" in refused(*own, tmp_path / "there.parquet")
    assert not [*tmp_path.glob("*.parts")]


def test_a_moved_folder_is_the_runs_own_set(trained: TrainOutcome, tmp_path: Path) -> None:
    moved = shutil.copytree(Path("trained"), tmp_path / "moved", copy_function=shutil.copy2)
    found = answer("evaluate", trained.run_id, f"data.root={moved}", "workers=1")
    assert found["tested"]["classes"] == 2 and found["metrics"]["test/map_at_r"] == trained.metrics["test/map_at_r"]
