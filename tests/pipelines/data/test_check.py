"""`dml data check`, and runs that leave out what cannot be read."""

import io
import json
import os
from pathlib import Path

import mlflow
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from pipelines.cli import main
from pipelines.config.recipe import data_section, load_recipe
from pipelines.console import QUIET
from pipelines.data.check import unreadable_pictures
from pipelines.data.sets import identify, load_collection
from pipelines.runs.train import run_training

pytestmark = pytest.mark.usefixtures("tracked_folder", "without_ray")
SMALL = ["data.name=folder", "data.image_size=32", "data.augment=crop", "epochs=1", "steps_per_epoch=2", "workers=1"]
SMALL += ["batch.classes=3", "batch.images=4", "backbone.name=small", "backbone.weights=none"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in range(8):
        (tmp_path / "set" / f"class {name}").mkdir(parents=True)
        for number in range(5):
            noise = rng.integers(0, 255, (40, 50, 3)).astype(np.uint8)
            Image.fromarray(noise).save(tmp_path / "set" / f"class {name}" / f"{number}.jpg")
    return tmp_path / "set"


def check(*arguments: str) -> tuple[int, dict]:
    found = CliRunner().invoke(main.app, ["data", "check", *arguments, "--json"])
    return found.exit_code, json.loads(found.stdout.splitlines()[-1])


def test_nothing_wrong(root: Path) -> None:
    code, report = check("folder", f"root={root}")
    assert code == 0 and report["problems"] == [] and report["unreadable"] == {}
    assert report["counts"] == {"train_classes": 4, "train_images": 20, "test_classes": 4, "test_images": 20}


def test_everything_wrong_is_named(root: Path) -> None:
    (root / "class 3" / "1.jpg").write_bytes(b"")
    (root / "class 5" / "2.jpg").write_bytes((root / "class 5" / "2.jpg").read_bytes()[:500])
    (root / "lonely").mkdir()
    everyone = [root / f"class {i}" / "0.jpg" for i in range(8)]
    (root / "lonely" / "0.jpg").write_bytes(everyone[0].read_bytes())
    for path in everyone[1:]:  # whatever the split, some lie in train and some in test
        path.write_bytes(everyone[0].read_bytes())
    code, report = check("folder", f"root={root}")
    assert code == 1 and set(report["unreadable"]) == {"class 3/1.jpg", "class 5/2.jpg"}
    assert report["unreadable"]["class 3/1.jpg"] == "empty file" and report["in_train_and_test"]
    told = "\n".join(report["problems"])
    assert "1 classes have one image alone, lonely first" in told and "the same picture in train and test" in told
    code, report = check("folder", f"root={root}", "--no-pictures")
    assert code == 1 and len(report["problems"]) == 1 and "unreadable" not in report


def test_wrong_counts_of_a_benchmark(tmp_path: Path) -> None:
    top = tmp_path / "CUB_200_2011"
    top.mkdir()
    (top / "image_class_labels.txt").write_text("".join(f"{i} {i}\n" for i in range(1, 201)))
    (top / "images.txt").write_text("".join(f"{i} {i:03d}.Bird/a.jpg\n" for i in range(1, 201)))
    code, report = check("cub", f"root={tmp_path}", "--no-pictures")
    assert code == 1 and "train_images: 100, but the published set has 5864" in report["problems"]
    assert report["counts"]["train_classes"] == report["expected"]["train_classes"] == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cubb", "root=x"], "data.name=cubb"),
        (["cub"], "root is needed for data.name=cub"),
        (["cub", "root=x", "rot=y"], "unknown key data.rot"),
        (["cub", "root=nowhere"], "not CUB-200-2011, there is no CUB_200_2011/images.txt; data.download=true fetches"),
        (["inshop", "root=x", "download=true"], "download cannot act on data.name=inshop"),
        (["folder", "root=s3://bucket/set"], "s3fs"),
        (["table", "root=x"], "table is needed for data.name=table"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    found = CliRunner().invoke(main.app, ["data", "check", *arguments])
    assert found.exit_code == 2 and message in found.stderr and found.stderr.count("\n") == 1


def test_skip_leaves_out_what_cannot_be_read_and_says_so(root: Path) -> None:
    for number in range(3):
        (root / "class 2" / f"{number}.jpg").write_bytes(b"no picture")
    given = [*SMALL, f"data.root={root}", "data.validation_fraction=0"]
    config = load_recipe("glyphs", [*given, "data.on_bad_image=skip", "name=skipping"])
    outcome = run_training(config, QUIET, here=True)
    assert outcome.metrics["data/left_out"] == 3
    client = mlflow.MlflowClient()
    assert client.get_run(outcome.run_id).data.metrics["data/left_out"] == 3
    left_out = mlflow.artifacts.load_text(f"runs:/{outcome.run_id}/left_out.txt").split("\n")
    assert left_out == [f"class 2/{number}.jpg" for number in range(3)]
    assert run_training(config, QUIET) == outcome
    from pipelines.console import RunFailed

    with pytest.raises(RunFailed, match="unreadable picture"):
        run_training(load_recipe("glyphs", [*given, "name=failing", "steps_per_epoch=20"]), QUIET, here=True)


def draw_noise(path: Path, rng: np.random.Generator) -> None:
    Image.fromarray(rng.integers(0, 255, (20, 20, 3)).astype(np.uint8)).save(path)


def test_one_picture_under_two_labels_and_copies_in_the_gallery(tmp_path: Path) -> None:
    """What copies do to R@1 is told, apart for those that help and those that hurt."""
    rng, rows = np.random.default_rng(0), ["path,label,split,role"]
    for label in "abcdef":
        for number in range(4):
            draw_noise(tmp_path / f"{label}{number}.png", rng)
            role = ("query" if number < 2 else "gallery") if label > "c" else ""
            rows.append(f"{label}{number}.png,{label},{'test' if label > 'c' else 'train'},{role}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    for copy, of in (("b0", "a0"), ("d2", "d0"), ("e3", "d0"), ("f2", "f0"), ("e2", "e3"), ("d3", "e1")):
        (tmp_path / f"{copy}.png").write_bytes((tmp_path / f"{of}.png").read_bytes())
    code, report = check("table", f"table={tmp_path}/t.csv")
    assert code == 1 and report["in_train_and_test"] == [] and report["without_match"] == {"test": 0}
    groups = sorted(map(sorted, report["under_several_labels"]))
    assert groups == [["a0.png", "b0.png"], ["d0.png", "d2.png", "e2.png", "e3.png"], ["d3.png", "e1.png"]]
    assert report["copies_in_gallery"] == {"test": {"queries": 6, "same_label": 2, "other_label": 1}}
    assert "the same picture under 2 labels: a0.png (a), b0.png (b)" in report["problems"]
    told = [line for line in report["problems"] if "queries have a copy" in line]
    assert [line.rpartition("R@1")[2] for line in told] == [
        " may be up to 33.3 points too high",
        " may be up to 16.7 points too low",
    ]


def test_copies_without_roles_and_by_the_same_camera(tmp_path: Path) -> None:
    """Without roles each picture has all others as its gallery; one of its own label and camera is not ranked."""
    rng, rows = np.random.default_rng(0), ["path,label,split,camera"]
    for label in "abcd":
        for number in range(3):
            draw_noise(tmp_path / f"{label}{number}.png", rng)
            rows.append(
                f"{label}{number}.png,{label},{'test' if label > 'b' else 'train'},{0 if label == 'd' else number}"
            )
    (tmp_path / "c1.png").write_bytes((tmp_path / "c0.png").read_bytes())
    (tmp_path / "d1.png").write_bytes((tmp_path / "d0.png").read_bytes())
    (tmp_path / "t.csv").write_text("\n".join(rows))
    _, report = check("table", f"table={tmp_path}/t.csv")
    assert report["copies_in_gallery"] == {"test": {"queries": 6, "same_label": 2, "other_label": 0}}
    assert report["without_match"] == {"test": 3}
    assert any("3 of 6 queries have no match" in line and "by another camera" in line for line in report["problems"])
    (tmp_path / "t.csv").write_text("\n".join(row.rpartition(",")[0] for row in rows))
    _, report = check("table", f"table={tmp_path}/t.csv")
    assert report["copies_in_gallery"]["test"]["same_label"] == 4 and report["without_match"] == {"test": 0}


def test_queries_without_a_match_are_counted(root: Path) -> None:
    for name in range(8):
        for path in sorted((root / f"class {name}").iterdir())[1:]:
            path.unlink()
    code, report = check("folder", f"root={root}", "--no-pictures")
    assert code == 1 and report["without_match"] == {"test": 4}
    assert "8 classes have one image alone, class 0 first" in report["problems"][0]
    assert report["problems"][1].startswith("test: 4 of 4 queries have no match in their gallery")


def test_what_is_passed_over_is_told_and_is_no_problem(root: Path) -> None:
    for name in ("class 1/@eaDir/0.jpg", "class 1/._0.jpg", "notes.txt", "stray.jpg", "class 2/x_mask.jpg"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes((root / "class 1" / "0.jpg").read_bytes())
    code, report = check("folder", f"root={root}", "exclude=[*_mask*]")
    assert code == 0 and report["problems"] == [] and sum(report["counts"].values()) == 8 + 40
    assert report["passed_over"] == {
        "files in or named @eaDir": 1,
        "files with a dot name": 1,
        "data.exclude *_mask*": 1,
        "files that end with .txt": 1,
        "pictures beside the class folders": 1,
    }
    output = CliRunner().invoke(main.app, ["data", "check", "folder", f"root={root}", "exclude=[*_mask*]"]).stdout
    assert output.count("passed over: ") == 1 and output.endswith("nothing wrong\n")


def test_the_same_answer_as_a_run_for_paths_of_all_kinds(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f"{path},{path.parent.name}" for path in sorted(root.rglob("*.jpg"))]
    (tmp_path / "t.csv").write_text("path,label\n" + "\n".join(rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for arguments in (["folder", "root=~/set"], ["folder", "root=set"], ["table", "table=t.csv", "root=~/set"]):
        code, report = check(*arguments)
        assert code == 0 and report["counts"]["test_images"] == 20
    assert check("table", "table=~/t.csv", "root=./set/")[0] == 0


def test_a_set_that_is_all_test_is_enough_for_an_evaluation(root: Path, tmp_path: Path) -> None:
    rows = [f"{path},{path.parent.name},test" for path in sorted(root.rglob("*.jpg"))]
    (tmp_path / "t.csv").write_text("path,label,split\n" + "\n".join(rows))
    code, report = check("table", f"table={tmp_path}/t.csv", f"root={root}")
    assert code == 1 and report["counts"]["test_images"] == 40
    assert report["problems"] == ["0 classes to train on: enough for dml evaluate, not for dml train"]


BAD_PATHS = ["class 1/0.jpg/inner.jpg", "x" * 300 + ".jpg", "class 1/a\0b.jpg", "class 1", "none.jpg", "loop.jpg"]


@pytest.mark.parametrize("remote", [False, True])
def test_bad_entries_of_a_table_are_listed_and_left_out(root: Path, tmp_path: Path, remote: bool) -> None:
    (root / "loop.jpg").symlink_to("loop.jpg")
    rows = [f"{path.relative_to(root)},{path.parent.name}" for path in sorted(root.glob("*/*.jpg"))]
    rows += [f"{path},class 1" for path in BAD_PATHS]
    (tmp_path / "t.csv").write_text("path,label\n" + "\n".join(rows))
    where = [f"table={tmp_path}/t.csv", f"root={'file://' if remote else ''}{root}"]
    code, report = check("table", *where)
    assert code == 1 and [*report["unreadable"]] == BAD_PATHS and len(report["problems"]) == len(BAD_PATHS)
    assert all("Errno" not in line and "\n" not in line for line in report["problems"])
    config = data_section("table", [*where, "on_bad_image=skip"])
    assert unreadable_pictures(config, identify(config), QUIET) == tuple(BAD_PATHS)
    assert len(load_collection(config, BAD_PATHS).images) == 40


def test_names_that_no_list_can_hold_are_left_out_or_refused(root: Path) -> None:
    with open(os.fsencode(root) + b"/class 1/caf\xe9.jpg", "wb") as file:
        file.write(b"")
    code, report = check("folder", f"root={root}")
    assert code == 1 and [*report["unreadable"]] == ["class 1/caf\\xe9.jpg"] and len(report["problems"]) == 1
    config = data_section("folder", [f"root={root}"])
    with pytest.raises(
        ValueError, match=r"1 entries cannot be read, class 1/caf.xe9.jpg first .*on_bad_image=skip leaves"
    ):
        load_collection(config)
    skipping = config.model_copy(update={"on_bad_image": "skip"})
    assert unreadable_pictures(skipping, identify(skipping), QUIET) == ("class 1/caf\\xe9.jpg",)
    assert len(load_collection(skipping).images) == 40


def test_a_forbidden_picture_on_a_server_is_named_at_once(web, root: Path, tmp_path: Path) -> None:
    url, server = web(root)
    (root / "class 1" / "0.jpg").rename(root / "class 1" / "forbidden.jpg")
    rows = [f"{path.relative_to(root)},{path.parent.name}" for path in sorted(root.glob("*/*.jpg"))]
    (tmp_path / "t.csv").write_text("path,label\n" + "\n".join(rows))
    server.do_GET = lambda self: self.send_error(403) if "forbidden" in self.path else super(server, self).do_GET()
    code, report = check("table", f"table={tmp_path}/t.csv", f"root={url}")
    assert code == 1 and report["unreadable"] == {"class 1/forbidden.jpg": "the server answers 403"}


def test_names_relative_to_another_folder_are_said_at_once(root: Path, tmp_path: Path) -> None:
    """Instead of a failure of a worker, and instead of a line for each of many pictures."""
    rows = [f"set/{path.relative_to(root)},{path.parent.name}" for path in sorted(root.glob("*/*.jpg"))]
    (root / "t.csv").write_text("path,label\n" + "\n".join(rows))
    code, report = check("table", f"table={root}/t.csv")
    assert code == 1 and len(report["unreadable"]) == 40 and len(report["problems"]) == 22
    assert report["problems"][-2] == "20 more unreadable, which --json names"
    assert f"relative to another folder than data.root={root}" in report["problems"][-1]
    config = load_recipe("glyphs", [*SMALL, "data.name=table", f"data.table={root}/t.csv", f"storage={tmp_path}"])
    with pytest.raises(
        ValueError, match=r"set/class .* cannot be read \(No such file or directory\), nor can others; are"
    ):
        run_training(config, QUIET)


def test_a_run_says_how_it_understood_the_set(root: Path, tmp_path: Path) -> None:
    (root / "Thumbs.db").write_text("")
    output = Console(file=io.StringIO(), width=300)
    config = load_recipe("glyphs", [*SMALL, f"data.root={root}", f"storage={tmp_path}", "name=telling"])
    run_training(config, output, here=True)
    assert output.file.getvalue().count("passed over: 1 files in or named Thumbs.db\n") == 1
    assert "passed over: 1 files in or named Thumbs.db" in (tmp_path / "telling" / "logs" / "driver.log").read_text()
