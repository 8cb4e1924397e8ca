"""Send a run's metrics to MLflow from a thread."""

import logging
import queue
import threading
import time

from mlflow.entities import Metric

from pipelines.tracking import server
from pipelines.tracking.records import EpochRecord

METRICS_PER_CALL = 1000  # MLflow's limit for one log_batch


class MetricSender:
    """Sends a run's records in order, from a thread; keeps what could not be sent and tries again.

    What MLflow has already, from before a crash, is not sent again: a slow or lost server never holds up a step.
    """

    def __init__(self, uri: str, run_id: str, history: list[EpochRecord]):
        self.client, self.run_id = server.connect(uri), run_id
        self.last_steps: dict[str, int] = {}
        self.pending: queue.Queue[EpochRecord | None] = queue.Queue()
        self.unsent, self.patience = 0, float("inf")
        self.thread = threading.Thread(target=self._send_all, daemon=True)
        self.thread.start()
        for record in history:
            self.log(record)

    def log(self, record: EpochRecord) -> None:
        """Send a record when its turn comes."""
        self.unsent += 1
        self.pending.put(record)

    def close(self, patience: float = 30.0) -> int:
        """Send what is left, for `patience` seconds at most. Return the number of records that were not sent."""
        self.patience = time.monotonic() + patience
        self.pending.put(None)
        self.thread.join(patience + 30)
        return self.unsent

    def _send_all(self) -> None:
        is_known = False  # a run that was killed before its first checkpoint has steps there too
        while (record := self.pending.get()) is not None:
            wait = 1.0
            while True:
                try:
                    if not is_known:
                        self.last_steps, is_known = self._read_last_steps(), True
                    self._send(record)
                    self.unsent -= 1
                    break
                except Exception:
                    logging.getLogger(__name__).warning("MLflow did not take epoch %s", record["step"], exc_info=True)
                    is_known = False  # part of it may have arrived
                    if time.monotonic() + wait > self.patience:
                        return
                    time.sleep(wait)
                    wait = min(2 * wait, 30.0)

    def _send(self, record: EpochRecord) -> None:
        now = record["time"]
        losses = enumerate(record.get("step_loss", []), record.get("first_step", 0))
        metrics = [Metric("train/step_loss", value, now, step) for step, value in losses]
        metrics += [Metric(key, value, now, record["step"]) for key, value in record["metrics"].items()]
        new = [m for m in metrics if m.step > self.last_steps.get(m.key, -1)]
        for start in range(0, len(new), METRICS_PER_CALL):
            self.client.log_batch(self.run_id, metrics=new[start : start + METRICS_PER_CALL])

    def _read_last_steps(self) -> dict[str, int]:
        keys = self.client.get_run(self.run_id).data.metrics
        return {key: max(m.step for m in self.client.get_metric_history(self.run_id, key)) for key in keys}
