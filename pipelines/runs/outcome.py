"""What a training returns, and what a run that belongs to a sweep is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dml_core.data.datasets import SetIdentity
from pipelines.phases import Phase

if TYPE_CHECKING:
    import ray.train

    from pipelines.cluster.worker import Report


class TrainOutcome(NamedTuple):
    """What `dml train --json` prints.

    Attributes:
        run_id: Of MLflow.
        experiment: Of MLflow, by name.
        checkpoint: Folder or URL of the best epoch's checkpoint.
        metrics: Of the last epoch, of the best one (val/best_map_at_r), and of the test.
        seconds: Of the whole command.
        images_per_second: Of the last epoch.
        name: Of the run and its folder.
        model: The registered model as NAME/VERSION; None where none was registered.
        phases: Where the seconds went; `begun` is counted from the start of the command.
    """

    run_id: str
    experiment: str
    checkpoint: str
    metrics: dict[str, float]
    seconds: float
    images_per_second: float
    name: str
    model: str | None
    phases: Sequence[Phase] = ()

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> TrainOutcome:
        """Return what was stored as JSON; earlier versions stored no phases."""
        return cls(**stored | {"phases": [Phase(*phase) for phase in stored.get("phases", ())]})


class SweepMember(NamedTuple):
    """What a run that belongs to a sweep is given.

    Attributes:
        uri: MLflow's store.
        parent: The sweep's run in MLflow.
        data: What the set is, for all runs of the sweep.
        tags: Of the run in MLflow.
        test: Whether the run is tested at its end and its model registered.
        report: Called with the metrics of each validated epoch, when the run is in this process.
        callbacks: Of Ray Train, when it is on workers.
    """

    uri: str
    parent: str
    data: SetIdentity
    tags: dict[str, str]
    test: bool
    report: Report = dict
    callbacks: Sequence[ray.train.UserCallback] = ()
