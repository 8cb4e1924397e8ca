"""What a run remembers of its epochs, and what is logged once at its end."""

import time


def final_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """What is known only at the end; the rest has been logged by epoch."""
    last_epochs = ("train/", "val/", "val_")
    return {key: value for key, value in metrics.items() if not key.startswith(last_epochs) or "best" in key}


def now_in_ms() -> int:
    return int(time.time() * 1000)
