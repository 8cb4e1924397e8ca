"""What a run tells MLflow of its epochs, and once at its end."""

import time
from typing import NamedTuple

from dml_core.learner import Terms
from pipelines.phases import Phase
from pipelines.tracking.records import EpochRecord

STEP_COLUMNS = (*Terms._fields, "gradient_norm")  # what is kept of each step


class TrainingResult(NamedTuple):
    """What the training loop returns.

    Attributes:
        metrics: Of the last epoch, of the best one, and of the test.
        records: Of every epoch and of the end. The driver has had most of them by then, and knows what is new.
        phases: Where rank 0's seconds went.
    """

    metrics: dict[str, float]
    records: list[EpochRecord]
    phases: list[Phase]


def final_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics that are known only at the end; the others have been logged by epoch."""
    by_epoch = ("train/", "val/", "val_")
    return {name: value for name, value in metrics.items() if not name.startswith(by_epoch) or "best" in name}


def now_in_ms() -> int:
    return int(time.time() * 1000)
