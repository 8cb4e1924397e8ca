"""What the workers are doing and have measured, followed by the driver: a line on its console, records to keep."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypedDict

from rich.console import Console

from pipelines.console import progress_bar
from pipelines.tracking.records import EpochRecord

INTERVAL = 1.0  # seconds between two messages, and between two looks
# In a log file: seconds between two lines of a stage other than the training.
INTERVAL_IN_LOG = 4.0


class Message(TypedDict, total=False):
    """The stage of the work, `done` of `total` units of it, facts to show beside the bar, and a line to print once."""

    stage: str
    done: int
    total: int
    epoch: str
    loss: float
    recall: float
    images_per_second: float
    notice: str


class News(NamedTuple):
    """What a board holds: the latest message, and the records after those that the reader has."""

    message: Message
    records: list[EpochRecord]


class Board(Protocol):
    """Where rank 0 writes for the driver: in the same process, or in an actor (see launch.py)."""

    def write(self, message: Message) -> object: ...

    def record(self, records: Sequence[EpochRecord]) -> object: ...

    def read(self, records_known: int) -> News: ...


class LocalBoard:
    """A board in the memory of the process that makes it: of the driver, or of an actor on its node."""

    def __init__(self) -> None:
        self.message: Message = {}
        self.records: list[EpochRecord] = []

    def write(self, message: Message) -> None:
        self.message = message

    def record(self, records: Sequence[EpochRecord]) -> None:
        self.records += records

    def read(self, records_known: int) -> News:
        return News(self.message, self.records[records_known:])


class Reporter:
    """Rank 0's end: writes to the board once a second at most and never waits for it."""

    def __init__(self, board: Board | None):
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
            self.board.write({**self.facts, "stage": stage, "done": done, "total": total})

    def say(self, line: str) -> None:
        """Tell the user something in a line, which goes with the next message."""
        self.facts["notice"] = line
        self.last = 0.0

    def record(self, records: Sequence[EpochRecord]) -> None:
        """Hand records of epochs to the driver, which knows what of them is new."""
        if self.board is not None:
            self.board.record(records)


class Follower:
    """The driver's end: shows what the board says, and hands its records on, until the `with` block ends.

    Attributes:
        board: What is followed.
        console: Where progress is shown.
        waiting: What is shown until the board says something.
        keep: Called with each record, in order; None: nobody wants them.
    """

    def __init__(
        self, board: Board, console: Console, waiting: str, keep: Callable[[EpochRecord], object] | None = None
    ):
        self.board, self.console, self.waiting, self.keep = board, console, waiting, keep
        self.stopped = threading.Event()
        self.bar = progress_bar(console)
        self.records_known = 0
        self.stage, self.last_line, self.last_printed = "", "", 0.0
        self.notice = ""

    def __enter__(self) -> "Follower":
        self.bar.start()
        self.task = self.bar.add_task(self.waiting, total=None, facts="")
        self.last_printed = time.monotonic()
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join(5)
        self.bar.stop()

    def _follow(self) -> None:
        while not self.stopped.wait(INTERVAL):
            self._look()
        self._look()  # what was recorded since

    def _look(self) -> None:
        try:
            news = self.board.read(self.records_known)
        except (RuntimeError, ConnectionError, TimeoutError):
            # The cluster is busy or going down; it is not the bar that tells.
            logging.getLogger(__name__).debug("no progress to show", exc_info=True)
            return
        self.records_known += len(news.records)
        if self.keep:
            for record in news.records:
                self.keep(record)
        if news.message:
            self._show(news.message)
        elif not self.console.is_terminal and time.monotonic() - self.last_printed > INTERVAL_IN_LOG:
            self.last_printed = time.monotonic()
            self.console.print(self.waiting, highlight=False)

    def _show(self, message: Message) -> None:
        if message["stage"] != self.stage:
            self.stage = message["stage"]
            self.bar.reset(self.task, description=self.stage)
        facts = describe_facts(message)
        self.bar.update(self.task, completed=message["done"], total=message["total"], facts=facts)
        if message.get("notice", "") != self.notice:
            self.notice = message["notice"]
            self.console.print(self.notice, style="yellow", highlight=False, markup=False)
        if self.console.is_terminal:
            return
        # In a log file: a line an epoch, and of what comes before and after the epochs a line every few seconds.
        line = f"{self.stage} {message.get('epoch', '')}"
        waited = time.monotonic() - self.last_printed > INTERVAL_IN_LOG and self.stage != "training"
        if line != self.last_line or (waited and message["done"] < message["total"]):
            self.last_line, self.last_printed = line, time.monotonic()
            self.console.print(f"{self.stage:<10} {message['done']}/{message['total']} {facts}", highlight=False)


def describe_facts(message: Message) -> str:
    """Return the facts of a message as they stand beside the bar."""
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
