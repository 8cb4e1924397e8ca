"""Settings of a recipe beside each other on validation classes, paired over seeds and folds; no test class is touched.

    python benchmarks/settings.py glyphs --try "method=[]" --try "method=[iaa]" --try "method=[iaa] iaa.start=0.4"
    python benchmarks/settings.py grocery data.root=GroceryStoreDataset --try "method=[]" --try "method=[namr]"

Each `--try` holds assignments; gains are over the first. Every score is kept in ./runs/settings.jsonl, and the same
command goes on where it was interrupted. All settings are trained with one seed and fold before the next, so that the
table of what is there is paired at any time.
"""

import argparse
import itertools
import json
import shlex
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipelines.cli.endings import run_script
from pipelines.cluster.devices import resolve_devices
from pipelines.cluster.in_process import run_in_process
from pipelines.config import Config
from pipelines.config.identity import group_of
from pipelines.config.recipe import load_recipe
from pipelines.console import QUIET
from pipelines.data.sets import identify
from pipelines.kept import keep_between_runs
from pipelines.training.job import TrainingJob

KEPT = Path("runs", "settings.jsonl")


class Run(NamedTuple):
    """A training that validates on one fold of the training classes, by which its score is kept.

    Attributes:
        setting: Its assignments, for people.
        seed: Its seed.
        fold: The fold that it validates on.
        group: Digest of the rest of its config, and of the pictures.
    """

    setting: str
    seed: int
    fold: int
    group: str


def score(config: Config) -> float:
    """Train in this process, and return MAP@R of the best epoch on the validation classes."""
    with tempfile.TemporaryDirectory() as storage:
        Path(storage, "run").mkdir()
        job = TrainingJob(config.model_copy(update={"storage": storage, "name": "run"}), test=False)
        return float(run_in_process(job, QUIET).metrics["val/best_map_at_r"])


def read_scores() -> dict[Run, float]:
    """Return the scores that were kept."""
    lines = KEPT.read_text().splitlines() if KEPT.exists() else []
    return {Run(**row["run"]): row["score"] for row in map(json.loads, lines)}


def keep_score(run: Run, score: float) -> None:
    """Add a score to those that are kept."""
    KEPT.parent.mkdir(exist_ok=True)
    with KEPT.open("a") as file:
        print(json.dumps({"run": run._asdict(), "score": score}), file=file)


def table(settings: Sequence[str], pairs: Sequence[Sequence[float]]) -> str:
    """Return what each setting gains over the first, with its standard error over the pairs.

    Args:
        settings: The columns of `pairs`.
        pairs: For each seed and fold, the score of each setting.
    """
    rows = ["| setting | MAP@R | gained | better in |", "|---|---|---|---|"]
    for setting, scores in zip(settings, zip(*pairs, strict=True), strict=True):
        gains = [100 * (score - pair[0]) for score, pair in zip(scores, pairs, strict=True)]
        error = f" ± {statistics.stdev(gains) / len(gains) ** 0.5:.2f}" if len(gains) > 1 else ""
        better = f"{statistics.mean(gains):+.2f}{error} | {sum(gain > 0 for gain in gains)} of {len(gains)}"
        gained = " | " if setting == settings[0] else better
        rows.append(f"| `{setting}` | {100 * statistics.mean(scores):.2f} | {gained} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("assignments", nargs="*", metavar="key=value")
    parser.add_argument("--try", dest="settings", action="append", required=True, metavar="'key=value ...'")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int, default=2)
    options = parser.parse_args()
    keep_between_runs()
    scores, pairs = read_scores(), list[list[float]]()
    for seed, fold in itertools.product(range(options.seeds), range(options.folds)):
        own = [f"seed={seed}", f"data.folds={options.folds}", f"data.fold={fold}", "workers=1"]
        pairs.append([])
        for setting in options.settings:
            config = load_recipe(options.recipe, [*options.assignments, *shlex.split(setting), *own])
            config = resolve_devices(config, here=True)
            run = Run(setting, seed, fold, group_of(config.flat(), identify(config.data).digest))
            if run not in scores:
                scores[run] = score(config)
                keep_score(run, scores[run])
            pairs[-1].append(scores[run])
        print(table(options.settings, pairs), flush=True)


if __name__ == "__main__":
    run_script(main, "the same command goes on")
