"""What the workers are doing, shown as one line on the driver."""

import threading
import time
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

INTERVAL = 0.5  # seconds between two messages, and between two looks


@ray.remote(num_cpus=0)
class Board:
    """Holds the latest message."""

    def __init__(self) -> None:
        self.message: dict[str, Any] = {}

    def write(self, message: dict[str, Any]) -> None:
        self.message = message

    def read(self) -> dict[str, Any]:
        return self.message


class Reporter:
    """Rank 0's end: writes to the board twice a second at most and never waits for it."""

    def __init__(self, board: Any):
        self.board, self.last = board, 0.0
        self.facts: dict[str, Any] = {}

    def due(self) -> bool:
        return self.board is not None and time.monotonic() - self.last > INTERVAL

    def note(self, stage: str, done: int, of: int, **facts: Any) -> None:
        """facts: shown beside the bar, and remembered for later stages."""
        self.facts.update(facts)
        if self.due() or (self.board is not None and done == of):
            self.last = time.monotonic()
            self.board.write.remote({"stage": stage, "done": done, "of": of, **self.facts})


class Bar:
    """The driver's end: a bar that follows the board until the `with` block ends."""

    def __init__(self, board: Any, console: Console):
        self.board, self.console, self.stopped = board, console, threading.Event()
        self.bar = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )

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
        stage, shown = "", ""
        while not self.stopped.wait(INTERVAL):
            try:
                message = ray.get(self.board.read.remote(), timeout=5)
            except Exception:
                continue  # the cluster is busy or going down; the bar is not what tells
            if not message:
                continue
            if message["stage"] != stage:
                stage = message["stage"]
                self.bar.reset(self.task, description=stage)
            self.bar.update(self.task, completed=message["done"], total=message["of"], facts=_facts(message))
            if not self.console.is_terminal and (line := f"{stage} {message.get('epoch', '')}") != shown:
                shown = line  # in a log file: a line an epoch in place of a moving bar
                self.console.print(f"{stage:<10} {message['done']}/{message['of']} {_facts(message)}", highlight=False)


def _facts(message: dict[str, Any]) -> str:
    forms = {
        "epoch": "epoch {}",
        "loss": "loss {:.4f}",
        "recall": "val R@1 {:.1%}",
        "images_per_second": "{:,.0f} images/s",
    }
    return "  ".join(form.format(message[key]) for key, form in forms.items() if message.get(key) is not None)
