"""Send a run's metrics to MLflow from a thread."""

import logging
import queue
import threading
import time
from concurrent.futures import Executor

from pipelines.tracking.records import EpochRecord
from pipelines.tracking.runs import MetricPoint, read_last_steps, send_points


class MetricSender:
    """Sends a run's records in order, from a thread; keeps what could not be sent and tries again.

    What MLflow has already, from before a crash, is not sent again: a slow or lost server never holds up a step.
    """

    def __init__(self, tracker: Executor, uri: str, run_id: str):
        """Start the thread.

        Args:
            tracker: Calls what speaks to MLflow, see process.py.
            uri: MLflow's store.
            run_id: Of MLflow.
        """
        self.tracker, self.uri, self.run_id = tracker, uri, run_id
        self.last_steps: dict[str, int] = {}
        self.known = set[tuple[object, ...]]()
        self.pending: queue.Queue[EpochRecord | None] = queue.Queue()
        self.unsent, self.patience = 0, float("inf")
        self.thread = threading.Thread(target=self._send_all, daemon=True)
        self.thread.start()

    def log(self, record: EpochRecord) -> None:
        """Send a record when its turn comes; not again one that was handed over before."""
        identity = (record["step"], record["time"], *record["metrics"])
        if identity not in self.known:
            self.known.add(identity)
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
                        self.last_steps = self.tracker.submit(read_last_steps, self.uri, self.run_id).result()
                        is_known = True
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
        points = [MetricPoint("train/step_loss", value, now, step) for step, value in losses]
        points += [MetricPoint(key, value, now, record["step"]) for key, value in record["metrics"].items()]
        new = [point for point in points if point.step > self.last_steps.get(point.key, -1)]
        self.tracker.submit(send_points, self.uri, self.run_id, new).result()
        self.last_steps |= {point.key: point.step for point in new}
