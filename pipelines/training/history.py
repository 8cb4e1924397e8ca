"""What a run tells MLflow of its epochs, and once at its end."""

import time

from dml_core.learner import Terms

STEP_COLUMNS = (*Terms._fields, "gradient_norm")  # what is kept of each step


def final_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics that are known only at the end; the others have been logged by epoch."""
    by_epoch = ("train/", "val/", "val_")
    return {name: value for name, value in metrics.items() if not name.startswith(by_epoch) or "best" in name}


def now_in_ms() -> int:
    return int(time.time() * 1000)
