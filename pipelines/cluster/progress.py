"""What the workers are doing, shown as one line on the driver."""

import logging
import threading
import time
from typing import TypedDict, cast

import ray
from ray.actor import ActorHandle
from rich.console import Console

from pipelines.console import progress_bar

INTERVAL = 0.5  # seconds between two messages, and between two looks


class Message(TypedDict, total=False):
    """The stage of the work, `done` of `total` units of it, and facts to show beside the bar."""

    stage: str
    done: int
    total: int
    epoch: str
    loss: float
    recall: float
    images_per_second: float


@ray.remote(num_cpus=0)
class Board:
    """An actor that holds the latest message."""

    def __init__(self) -> None:
        self.message: Message = {}

    def write(self, message: Message) -> None:
        self.message = message

    def read(self) -> Message:
        return self.message


class Reporter:
    """Rank 0's end: writes to the board twice a second at most and never waits for it."""

    def __init__(self, board: ActorHandle | None):
        self.board, self.last = board, 0.0
        self.facts: Message = {}

    def due(self) -> bool:
        """Whether somebody looks, and has not been told of anything for a while."""
        return self.board is not None and time.monotonic() - self.last > INTERVAL

    def note(self, stage: str, done: int, total: int, facts: Message | None = None) -> None:
        """Tell how far a stage is, if it is time to.

        Args:
            stage: What is being done, in a word.
            done: Units of work done.
            total: Units of work in the stage.
            facts: Shown beside the bar, and remembered for later stages.
        """
        self.facts.update(facts or {})
        if self.board is not None and (self.due() or done == total):
            self.last = time.monotonic()
            self.board.write.remote({**self.facts, "stage": stage, "done": done, "total": total})


class Bar:
    """The driver's end: a bar that follows the board until the `with` block ends."""

    def __init__(self, board: ActorHandle, console: Console):
        self.board, self.console, self.stopped = board, console, threading.Event()
        self.bar = progress_bar(console)

    def __enter__(self) -> "Bar":
        self.bar.start()
        self.task = self.bar.add_task("starting", total=None, facts="")
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join(5)
        self.bar.stop()

    def _follow(self) -> None:
        stage, last_line = "", ""
        while not self.stopped.wait(INTERVAL):
            try:
                message = cast(Message, ray.get(self.board.read.remote(), timeout=5))
            except (ray.exceptions.RayError, ConnectionError, TimeoutError):
                # The cluster is busy or going down; it is not the bar that tells.
                logging.getLogger(__name__).debug("no progress to show", exc_info=True)
                continue
            if not message:
                continue
            if message["stage"] != stage:
                stage = message["stage"]
                self.bar.reset(self.task, description=stage)
            self.bar.update(self.task, completed=message["done"], total=message["total"], facts=_facts(message))
            if not self.console.is_terminal and (line := f"{stage} {message.get('epoch', '')}") != last_line:
                last_line = line  # in a log file: a line an epoch in place of a moving bar
                count = f"{message['done']}/{message['total']}"
                self.console.print(f"{stage:<10} {count} {_facts(message)}", highlight=False)


def _facts(message: Message) -> str:
    parts = []
    if "epoch" in message:
        parts.append(f"epoch {message['epoch']}")
    if "loss" in message:
        parts.append(f"loss {message['loss']:.4f}")
    if "recall" in message:
        parts.append(f"val R@1 {message['recall']:.1%}")
    if "images_per_second" in message:
        parts.append(f"{message['images_per_second']:,.0f} images/s")
    return "  ".join(parts)
