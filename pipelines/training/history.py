"""What a run tells MLflow of its epochs, and once at its end."""

import time
from typing import Protocol

from dml_core.learner import Terms
from pipelines.tracking.records import EpochRecord

STEP_COLUMNS = (*Terms._fields, "gradient_norm")  # what is kept of each step


class Sender(Protocol):
    """Sends records to MLflow, see tracking/sender.py."""

    def log(self, record: EpochRecord) -> None: ...

    def close(self) -> int: ...


def open_sender(uri: str, run_id: str, history: list[EpochRecord]) -> Sender:
    """Start to send a run's history. MLflow takes seconds to import, and one rank alone speaks to it."""
    from pipelines.tracking.sender import MetricSender

    return MetricSender(uri, run_id, history)


def final_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics that are known only at the end; the others have been logged by epoch."""
    by_epoch = ("train/", "val/", "val_")
    return {name: value for name, value in metrics.items() if not name.startswith(by_epoch) or "best" in name}


def now_in_ms() -> int:
    return int(time.time() * 1000)
