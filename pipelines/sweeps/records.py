"""What a sweep is and what its trials report."""

import hashlib
import json
from typing import Any, NamedTuple

from pipelines.config.schema import Config
from pipelines.sweeps.spaces import Point


class SweepOutcome(NamedTuple):
    """What `dml tune --json` prints.  tested: lines of `dml compare`, the defaults being the baseline."""

    sweep: str
    run_id: str
    winner: Point
    score: float
    recipe: str
    model: str | None
    trials: list[dict[str, Any]]
    tested: list[dict[str, Any]]
    warnings: list[str]
    seconds: float


class Trial(NamedTuple):
    """score: mean over folds of the best val/map_at_r; None where there is none.  ended: finished, stopped, failed."""

    name: str
    point: Point
    score: float | None
    epochs: int
    ended: str
    reason: str


SCORE, EPOCHS, FAILED, SETTINGS = "score", "epochs_done", "failed", "settings"  # what trials report

CLOCK = "clock"  # epochs, but short of the end, where it would be too late to change settings


class SweepOptions(NamedTuple):
    """What a sweep is, beside the config it starts from.

    space: names of tune_spaces joined by +, or a FILE.py with a SPACE.  samples: points; of a grid, on each range.
    concurrent: trials at a time; None: as many as fit.  search: optuna, random, grid.  schedule: asha, none, pbt.
    folds: trainings of a point, on other validation classes each.  final_seeds: test runs of the winner, and as many of
    the defaults.
    """

    space: str
    samples: int = 32
    concurrent: int | None = None
    search: str = "optuna"
    schedule: str = "asha"
    folds: int = 1
    final_seeds: int = 5


class Sweep(NamedTuple):
    """A sweep under way.  folder: storage/NAME, holding all its runs.  uri, run_id: of MLflow, the parent run."""

    name: str
    folder: str
    uri: str
    run_id: str
    config: Config
    options: SweepOptions


def trial_name(trial_id: str, point: Point) -> str:
    """Its number, and its settings: a number that a killed sweep gave twice does not mix two points."""
    plain = json.loads(json.dumps(point))  # numbers as keys are texts once Ray Tune has kept them
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:6]
    return f"t{trial_id.rpartition('_')[2]}-{digest}"


def fold_values(fold: int, folds: int) -> dict[str, Any]:
    return {"data.fold": fold, "data.folds": folds}
