"""What a sweep is, what its trials report to Ray Tune, and what it ends with."""

import hashlib
import json
from typing import Any, Final, Literal, NamedTuple, NotRequired, TypedDict

from dml_core.data.datasets import SetIdentity
from pipelines.compare.wording import Line
from pipelines.config.schema import Config
from pipelines.sweeps.spaces import Point

SEARCHES, SCHEDULES = ("optuna", "random", "grid"), ("asha", "none", "pbt")

# Keys of TrialReport, by which Ray Tune's searches and schedulers know them.
SCORE: Final = "score"
EPOCHS: Final = "epochs_done"
CLOCK: Final = "clock"
FAILED: Final = "failed"
SETTINGS: Final = "settings"


class TrialConfig(TypedDict):
    """What Ray Tune hands a trial of the search.

    Attributes:
        point: What to train.
        number: Of the point, where a search draws them, see search.NumberedOptuna.
    """

    point: Point
    number: NotRequired[int]


class TrialReport(TypedDict):
    """What a trial of the search reports after each validation.

    Attributes:
        score: Mean over the folds begun of the best val/map_at_r so far.
        epochs_done: Epochs trained, of all folds.
        clock: The same, but short of the end, where it would be too late to change settings.
        settings: The trial's settings, with the changes on their way.
        failed: Why the trial failed.
    """

    score: float
    epochs_done: int
    clock: int
    settings: Point
    failed: NotRequired[str]


class FinalTask(TypedDict):
    """A final run to be made: whose settings ("winner" or "default"), their values, and the seed."""

    role: str
    seed: int
    settings: Point


class FinalConfig(TypedDict):
    """What Ray Tune hands a trial of the final stage."""

    point: FinalTask


class FinalReport(TypedDict):
    """What a final run reports: its best val/map_at_r, its name, MLflow's id, its registered model ("": none)."""

    score: float
    name: str
    run_id: str
    model: str


class FinalRun(NamedTuple):
    """A tested run of the winner or of the defaults; see FinalTask and FinalReport."""

    role: str
    score: float
    name: str
    run_id: str
    model: str


class Trial(NamedTuple):
    """A point of the space and how its training went.

    Attributes:
        name: The name of its run; with several folds their names begin with it.
        point: Dotted key to value; `changes` where settings changed on the way.
        score: Mean over folds of the best val/map_at_r; None: there is none.
        epochs: Epochs trained, of all folds.
        ended: "stopped" by the schedule, before its last epoch, or otherwise.
        reason: Why it failed; else empty.
    """

    name: str
    point: Point
    score: float | None
    epochs: int
    ended: Literal["finished", "stopped", "failed"]
    reason: str


class SweepOptions(NamedTuple):
    """What a sweep is, beside the config that it starts from.

    Attributes:
        space: Names of spaces (base, iaa, sgar, namr, all) or a FILE.py with a SPACE, joined by "+".
        samples: Points to try; of a grid, points on each range.
        concurrent: Trials at a time; None: as many as fit.
        search: "optuna" (TPE), "random" or "grid"; None: random with schedule "pbt", else optuna.
        schedule: "asha" ends early what falls behind, "none" trains all to the end, "pbt" changes settings on the way.
        folds: Trainings of each point, on other validation classes each.
        final_seeds: Tested runs of the winner, and as many of the defaults; 0: the search alone.
    """

    space: str
    samples: int = 32
    concurrent: int | None = None
    search: str | None = None
    schedule: str = "asha"
    folds: int = 1
    final_seeds: int = 5

    def resolve(self) -> "SweepOptions":
        """Return the options with the search filled in.

        Raises:
            ValueError: There is no such search or schedule.
        """
        search = self.search or ("random" if self.schedule == "pbt" else "optuna")
        for option, value, known in (("search", search, SEARCHES), ("schedule", self.schedule, SCHEDULES)):
            if value not in known:
                raise ValueError(f"--{option} {value}: {', '.join(known[:-1])} or {known[-1]}")
        return self._replace(search=search)


class SweepOutcome(NamedTuple):
    """What came of a sweep.

    Attributes:
        sweep: Its name.
        run_id: Of its run in MLflow.
        winner: The settings with the best score.
        score: Their score.
        recipe: The recipe with these settings: a path or URL.
        model: The champion as NAME/VERSION; None: no model was registered.
        trials: All trials of the search.
        tested: Lines of `dml compare`, the defaults being the baseline.
        warnings: What makes the comparison weaker than its numbers look.
        seconds: How long it took; of a sweep that was resumed, since then.
    """

    sweep: str
    run_id: str
    winner: Point
    score: float
    recipe: str
    model: str | None
    trials: list[Trial]
    tested: list[Line]
    warnings: list[str]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return what `dml tune --json` prints and outcome.json holds."""
        trials, tested = [trial._asdict() for trial in self.trials], [line._asdict() for line in self.tested]
        return self._asdict() | {"trials": trials, "tested": tested}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "SweepOutcome":
        """Return the outcome that `to_json` gave."""
        trials, tested = [Trial(**trial) for trial in tree["trials"]], [Line(**line) for line in tree["tested"]]
        return cls(**tree | {"trials": trials, "tested": tested})


class Sweep(NamedTuple):
    """A sweep under way.

    Attributes:
        name: Its name.
        folder: storage/NAME, which holds the folders of all its runs.
        uri: MLflow's store.
        run_id: The sweep's run in MLflow, the parent of its trials' runs.
        config: What the sweep starts from.
        data: What its set is.
        options: The rest of what it is.
    """

    name: str
    folder: str
    uri: str
    run_id: str
    config: Config
    data: SetIdentity
    options: SweepOptions


def trial_name(trial_id: str, config: TrialConfig, settings: Point) -> str:
    """Name a trial by its number and a digest of its settings.

    A killed sweep may give a number twice: the digest keeps two points apart.

    Args:
        trial_id: Of Ray Tune; it ends with the number where the points are a grid.
        config: Of the trial; has the number where a search draws the points.
        settings: Of the trial now, see population.settings_after.
    """
    number = f"{config['number']:05d}" if "number" in config else trial_id.rpartition("_")[2]
    plain = json.loads(json.dumps(settings))  # numbers as keys are texts once Ray Tune has kept them
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:6]
    return f"t{number}-{digest}"


def fold_values(fold: int, folds: int) -> dict[str, int | None]:
    """Return the config values of one of several folds; the share to validate on is for runs of no fold."""
    return {"data.fold": fold, "data.folds": folds, "data.validation_fraction": None}
