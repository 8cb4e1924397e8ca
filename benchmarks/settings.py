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
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipelines.cli.endings import run_script
from pipelines.cluster.devices import resolve_devices
from pipelines.cluster.in_process import run_in_process
from pipelines.config.recipe import load_recipe
from pipelines.console import QUIET
from pipelines.kept import keep_between_runs
from pipelines.training.job import TrainingJob

KEPT = Path("runs", "settings.jsonl")


class Run(NamedTuple):
    """A training that validates on one fold of the training classes.

    Attributes:
        recipe: Its name.
        common: The assignments of all settings.
        setting: Its own.
        seed: Its seed.
        fold: The fold that it validates on.
        folds: How many there are.
    """

    recipe: str
    common: str
    setting: str
    seed: int
    fold: int
    folds: int

    def score(self) -> float:
        """Train it in this process, and return MAP@R of its best epoch on the validation classes."""
        with tempfile.TemporaryDirectory() as storage:
            own = [f"seed={self.seed}", f"data.folds={self.folds}", f"data.fold={self.fold}", "workers=1", "name=run"]
            own += [f"storage={storage}"]
            config = load_recipe(self.recipe, [*self.common.split(), *self.setting.split(), *own])
            Path(storage, "run").mkdir()
            result = run_in_process(TrainingJob(resolve_devices(config, here=True), test=False), QUIET)
        return float(result.metrics["val/best_map_at_r"])


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
    scores, common, pairs = read_scores(), " ".join(options.assignments), list[list[float]]()
    for seed, fold in itertools.product(range(options.seeds), range(options.folds)):
        runs = [Run(options.recipe, common, setting, seed, fold, options.folds) for setting in options.settings]
        for run in runs:
            if run not in scores:
                scores[run] = run.score()
                keep_score(run, scores[run])
        pairs.append([scores[run] for run in runs])
        print(table(options.settings, pairs), flush=True)


if __name__ == "__main__":
    run_script(main, "the same command goes on")
