"""Seconds from Enter to an answer, beside the import of torch in the same minute.

    python benchmarks/startup.py [--repeat 3] [--folder FOLDER]

Refusals and descriptions, to their end; trainings of the smallest useful size, by one worker and by two, to their first
step and to their end; a search in an index; a report. The glyphs are rendered, MLflow's database is made and the index
is built before anything is timed. Medians of the repeats, each after an import of torch of its own; the longest silence
is that before the first step.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

TRAINING = ("train", "glyphs", "data.limit_classes=64", "epochs=1", "steps_per_epoch=5", "--json")
LIMITS = {  # of issue "Seconds", as ratios to the import of torch
    "dml evaluate nothing": 0.9,
    "dml config glyphs": 0.5,
    "dml recipes": 0.5,
    "dml data list": 0.5,
    "dml train epoch=3": 0.5,
    "workers=1: first line": None,
    "workers=1: longest silence": None,
    "workers=1: first step": 3.5,
    "workers=1: done": 5.0,
    "workers=2: first line": None,
    "workers=2: longest silence": None,
    "workers=2: first step": 6.5,
    "workers=2: done": 8.5,
    "dml index search": None,
    "dml report": None,
}


class Finished(NamedTuple):
    """A command that has ended.

    Attributes:
        seconds: From its start to its end.
        lines: When each line of standard error came, from its start.
        answer: The last line of standard output.
    """

    seconds: float
    lines: list[float]
    answer: str


def run(arguments: Sequence[str], expected: int = 0) -> Finished:
    """Run `dml` and note when it says something."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    with (
        tempfile.TemporaryFile("w+") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, text=True) as process,
    ):
        assert process.stderr
        said = [(time.perf_counter() - started, line) for line in process.stderr]
        code = process.wait()
        seconds = time.perf_counter() - started
        output.seek(0)
        answer = output.read().strip().rpartition("\n")[2]
    if code != expected:
        sys.exit(f"dml {' '.join(arguments)} ended with {code}:\n{''.join(line for _, line in said)}")
    return Finished(seconds, [when for when, _ in said], answer)


def import_torch() -> float:
    """Time the import of torch in a process of its own."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - started


def time_all(model: str, index: str, picture: str) -> dict[str, float]:
    """Time each command once.

    Args:
        model: A finished run.
        index: A folder that `dml index build` wrote.
        picture: A picture to search with.
    """
    seconds = {
        "dml evaluate nothing": run(["evaluate", "nothing"], expected=2).seconds,
        "dml config glyphs": run(["config", "glyphs"]).seconds,
        "dml recipes": run(["recipes"]).seconds,
        "dml data list": run(["data", "list"]).seconds,
        "dml train epoch=3": run(["train", "epoch=3"], expected=2).seconds,
    }
    for workers in (1, 2):
        done = run([*TRAINING, f"workers={workers}"])
        first_step = json.loads(done.answer)["metrics"]["train/startup_seconds"]
        before = [0.0, *(when for when in done.lines if when < first_step), first_step]
        silence = max(after - earlier for earlier, after in itertools.pairwise(before))
        seconds[f"workers={workers}: first line"] = done.lines[0]
        seconds[f"workers={workers}: longest silence"] = silence
        seconds[f"workers={workers}: first step"] = first_step
        seconds[f"workers={workers}: done"] = done.seconds
    seconds["dml index search"] = run(["index", "search", index, "--image", picture]).seconds
    seconds["dml report"] = run(["report", model, "--out", "report.html"]).seconds
    return seconds


def prepare(folder: Path) -> tuple[str, str, str]:
    """Train a small model and index pictures by it. Return the run, the index and a picture."""
    from dml_core.data.pictures import to_image
    from pipelines.config.sections import Data
    from pipelines.data.sets import load_collection

    model = json.loads(run([*TRAINING, "workers=1"]).answer)["run_id"]
    images = load_collection(Data()).images
    for number in range(100):
        path = folder / "pictures" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        to_image(images.picture(number, 32)).save(path)
    run(["embed", model, "--images", str(path.parent), "--out", "vectors.parquet"])
    run(["index", "build", "vectors.parquet", "--out", "index"])
    return model, "index", str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the runs go; a folder that is deleted by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(exist_ok=True)
        os.chdir(folder)
        subject = prepare(folder.resolve())
        rows: dict[str, list[tuple[float, float]]] = {name: [] for name in LIMITS}
        for _ in range(options.repeat):
            torch_before = import_torch()
            seconds = time_all(*subject)
            unit = statistics.mean([torch_before, import_torch()])
            for name, value in seconds.items():
                rows[name].append((value, value / unit))
        os.chdir("/")
    table = Table(title=f"medians of {options.repeat}; import of torch: {unit:.2f} s")
    for head in ("", "seconds", "times the import of torch", "wanted"):
        table.add_column(head, justify="right" if head else "left")
    for name, values in rows.items():
        median, ratio = (statistics.median(column) for column in zip(*values, strict=True))
        limit = LIMITS[name]
        table.add_row(name, f"{median:.2f}", f"{ratio:.2f}", f"{limit}" if limit else "")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
