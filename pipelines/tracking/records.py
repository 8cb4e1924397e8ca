"""What a run remembers of each epoch: kept in its checkpoints, sent to MLflow. Imports no MLflow."""

from typing import NotRequired, TypedDict


class EpochRecord(TypedDict):
    """One epoch of a run.

    Attributes:
        time: When it ended, in milliseconds since 1970.
        step: The epoch's number, from 1: MLflow's step of `metrics`.
        metrics: Name to value.
        first_step: The optimizer step that `step_loss` begins with, counted over all epochs.
        step_loss: The loss of each optimizer step of the epoch.
    """

    time: int
    step: int
    metrics: dict[str, float]
    first_step: NotRequired[int]
    step_loss: NotRequired[list[float]]
