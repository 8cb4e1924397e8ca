import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALL = ["data.limit_classes=12", "epochs=2", "steps_per_epoch=2", "batch.classes=4", "embedding_dim=8"]


def diagnose(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "benchmarks" / "diagnose.py"), *arguments]
    path = {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=os.environ | path, capture_output=True, text=True)


def test_every_method_is_looked_at_and_the_same_command_trains_nothing_again(tmp_path: Path) -> None:
    arguments = ["glyphs", *SMALL, "iaa.draws=2", "iaa.start=0.5", "sgar.margin=0.2"]
    first = diagnose(tmp_path, *arguments)
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert max(map(len, lines)) <= 140
    rows = {line.split("  ")[0].strip(): line.split() for line in lines}
    for measure in ("MAP@R %", "effective rank", "alignment", "uniformity", "variance of a class, training"):
        assert [float(cell) for cell in rows[measure][-4:]], measure
    epochs = [line.split() for line in lines if line.startswith(("1 ", "2 "))]
    assert len(epochs) == 2 and epochs[0][1] == "none" and epochs[1][1] != "none"  # IAA begins with the second epoch
    assert "margin of 0.2" in first.stdout
    checkpoints = sorted(tmp_path.glob("runs/diagnose-*/each/*/state.json"))
    times = [path.stat().st_mtime for path in checkpoints]
    assert len(checkpoints) == 8
    again = diagnose(tmp_path, *arguments)
    assert again.stdout == first.stdout
    assert [path.stat().st_mtime for path in checkpoints] == times


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    for arguments, reason in (
        (["glyphs", "sgar.margin=0.2", "--methods", "iaa"], "sgar is not among --methods iaa"),
        (["glyphs", "data.validation_fraction=0"], "nothing is held out"),
        (["glyphs", "epoch=2"], "did you mean epochs?"),
    ):
        ended = diagnose(tmp_path, *arguments)
        assert ended.returncode == 2 and reason in ended.stderr and ended.stdout == ""
        assert len(ended.stderr.splitlines()) == 1
