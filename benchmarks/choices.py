"""What the learning rate, the batch and the number of epochs do to a recipe, on validation classes.

    python benchmarks/choices.py glyphs
    python benchmarks/choices.py grocery data.root=GroceryStoreDataset

Each is varied alone, by a grid of `dml tune` that trains every point to its end over `--folds` folds of the training
classes and tests nothing. It is kept in ./runs, and the same command goes on where it was interrupted.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.cli.endings import run_script
from pipelines.cluster.session import open_cluster
from pipelines.config import Config, load
from pipelines.config.identity import group_of
from pipelines.config.recipe import parse_assignments
from pipelines.config.schema import flatten
from pipelines.data.sets import identify
from pipelines.sweeps.records import SweepOptions, SweepOutcome
from pipelines.sweeps.sweep import resume_sweep, start_sweep

Grid = Mapping[str, list[Any]]


def grids(config: Config) -> dict[str, Grid]:
    """Return what is varied: a name -> keys and their values."""
    classes, images, lr = config.batch.classes, config.batch.images, config.optimizer.lr
    return {
        "lr": {"optimizer.lr": [lr / 9, lr / 3, lr, lr * 3]},
        "batch": {"batch.classes": [classes // 2, classes], "batch.images": [images // 2, images]},
        "epochs": {"epochs": [max(1, config.epochs // 2), config.epochs, 2 * config.epochs]},
    }


def search(recipe: str, values: Mapping[str, Any], name: str, grid: Grid, folds: int) -> SweepOutcome:
    """Train all points of a grid, or return what was found before."""
    if Path("runs", name, "sweep.json").exists():
        return resume_sweep(name)
    space = Path("runs", f"{name}.py")
    space.parent.mkdir(exist_ok=True)
    choices = ", ".join(f"{key!r}: tune.choice({several})" for key, several in grid.items())
    space.write_text(f"from ray import tune\n\nSPACE = {{{choices}}}\n")
    options = SweepOptions(str(space), search="grid", schedule="none", folds=folds, final_seeds=0)
    return start_sweep(recipe, {**values, "name": name}, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("assignments", nargs="*", metavar="key=value")
    parser.add_argument("--folds", type=int, default=2)
    options = parser.parse_args()
    values = flatten(parse_assignments(options.assignments))
    config, rows = load(options.recipe, values), []
    group = group_of(config.flat(), identify(config.data).digest)  # another config or other pictures begin anew
    sweeps = f"choices-{options.recipe}-{group}-{options.folds}"
    with open_cluster(config, None):
        for name, grid in grids(config).items():
            outcome = search(options.recipe, values, f"{sweeps}-{name}", grid, options.folds)
            for trial in outcome.trials:
                setting = " ".join(f"{key}={value:g}" for key, value in trial.point.items())
                rows.append(f"| `{setting}` | {100 * (trial.score or 0):.1f} |")
    print(f"| {options.recipe} | MAP@R, validation classes |", "|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    run_script(main, "the same command goes on")
