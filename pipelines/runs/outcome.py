"""What a training returns, and what a run that belongs to a sweep is given."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ray.train


class TrainOutcome(NamedTuple):
    """What `dml train --json` prints. `checkpoint`: the best epoch's. `model`: its registered version."""

    run_id: str
    experiment: str
    checkpoint: str
    metrics: dict[str, float]
    seconds: float
    images_per_second: float
    name: str
    model: str | None


class SweepMember(NamedTuple):
    """Of a run that is part of a sweep.

    uri, parent: of MLflow, the sweep's run.  tags: of the run.  test: whether it is tested and its model registered.
    report: called with the metrics of each epoch that is validated, when the run is in this process.  callbacks: of Ray
    Train, when it is on workers.
    """

    uri: str
    parent: str
    tags: dict[str, str]
    test: bool
    report: Callable[[dict[str, Any]], object] = dict
    callbacks: Sequence[ray.train.UserCallback] = ()
