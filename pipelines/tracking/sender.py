"""Send a run's metrics to MLflow from a thread."""

import logging
import queue
import threading
import time
from typing import Any

from mlflow.entities import Metric

from pipelines.tracking import server

METRICS_PER_CALL = 1000  # MLflow's limit for one log_batch


class MetricSender:
    """Sends a run's history from a thread, in order; keeps what could not be sent and tries again.

    A record is {"time": ms, "step": epoch, "metrics": {name: value}} and may have "first_step" and "step_loss": [...],
    the loss of each optimizer step. What MLflow has already, from before a crash, is not sent again.
    """

    def __init__(self, uri: str, run_id: str, history: list[dict[str, Any]]):
        self.client, self.run_id = server.connect(uri), run_id
        self.seen: dict[str, int] = {}
        self.pending: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.unsent, self.patience = 0, float("inf")
        self.thread = threading.Thread(target=self._send_all, daemon=True)
        self.thread.start()
        for record in history:
            self.log(record)

    def log(self, record: dict[str, Any]) -> None:
        self.unsent += 1
        self.pending.put(record)

    def close(self, patience: float = 30.0) -> int:
        """Send what is left, for `patience` seconds at most. Returns the number of records that were not sent."""
        self.patience = time.monotonic() + patience
        self.pending.put(None)
        self.thread.join(patience + 30)
        return self.unsent

    def _send_all(self) -> None:
        known = False  # a run that was killed before its first checkpoint has steps there too
        while (record := self.pending.get()) is not None:
            wait = 1.0
            while True:
                try:
                    if not known:
                        self.seen, known = self._last_steps(), True
                    self._send(record)
                    self.unsent -= 1
                    break
                except Exception as error:
                    logging.getLogger(__name__).warning("MLflow did not take epoch %s: %s", record["step"], error)
                    known = False  # part of it may have arrived
                    if time.monotonic() + wait > self.patience:
                        return
                    time.sleep(wait)
                    wait = min(2 * wait, 30.0)

    def _send(self, record: dict[str, Any]) -> None:
        now = record["time"]
        losses = enumerate(record.get("step_loss", []), record.get("first_step", 0))
        metrics = [Metric("train/step_loss", value, now, step) for step, value in losses]
        metrics += [Metric(key, value, now, record["step"]) for key, value in record["metrics"].items()]
        new = [m for m in metrics if m.step > self.seen.get(m.key, -1)]
        for start in range(0, len(new), METRICS_PER_CALL):
            self.client.log_batch(self.run_id, metrics=new[start : start + METRICS_PER_CALL])

    def _last_steps(self) -> dict[str, int]:
        keys = self.client.get_run(self.run_id).data.metrics
        return {key: max(m.step for m in self.client.get_metric_history(self.run_id, key)) for key in keys}
