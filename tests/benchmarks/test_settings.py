import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALL = ["data.limit_classes=16", "epochs=1", "steps_per_epoch=1", "batch.classes=4", "embedding_dim=8"]
TRIES = ["--try", "method=[]", "--try", "method=[] optimizer.lr=0.3"]


def test_settings_are_paired_and_the_same_command_trains_nothing_again(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "settings.py"), "glyphs", *SMALL, *TRIES, "--seeds", "1"]

    def run() -> list[str]:
        path = {"PYTHONPATH": str(ROOT)}
        return subprocess.check_output(command, cwd=tmp_path, env=os.environ | path, text=True).splitlines()

    kept = tmp_path / "runs" / "settings.jsonl"
    table, scores = run(), kept.read_text()
    assert len(scores.splitlines()) == 4  # of two settings and two folds
    first, other = table[-2:]
    assert first.startswith("| `method=[]` |") and first.endswith("|  |  |")
    cells = [cell.strip() for cell in other.split("|")]
    gain = float(cells[2]) - float(first.split("|")[2])
    assert abs(float(cells[3].split(" ± ")[0]) - gain) < 0.011 and cells[4] in ("0 of 2", "1 of 2", "2 of 2")
    assert run() == table and kept.read_text() == scores
