"""Where the seconds of a command go, phase by phase."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Phase(NamedTuple):
    """A part of a command's time. Phases of the driver and of its workers may overlap.

    Attributes:
        name: What is done.
        begun: When it began first, in seconds since 1970.
        seconds: How long it took, every time together.
    """

    name: str
    begun: float
    seconds: float


class Clock:
    """Measures the phases of one process, one after the other.

    Attributes:
        last: When the phase under way began, in seconds since 1970.
        phases: The finished ones, by name, in the order in which they began first.
    """

    def __init__(self, started: float | None = None):
        """Begin the first phase, now or at a time in seconds since 1970."""
        self.last = started or time.time()
        self.phases: dict[str, Phase] = {}

    def lap(self, name: str) -> None:
        """End the phase under way, and say what it was."""
        now = time.time()
        self.add(Phase(name, self.last, now - self.last))
        self.last = now

    def add(self, phase: Phase) -> None:
        """Add a phase that was measured elsewhere; one of a name that is there makes that longer."""
        earlier = self.phases.get(phase.name, Phase(phase.name, phase.begun, 0.0))
        self.phases[phase.name] = earlier._replace(seconds=earlier.seconds + phase.seconds)

    @contextmanager
    def beside(self, name: str) -> Iterator[None]:
        """Measure a block that runs beside the phase under way, in a thread of its own."""
        begun = time.time()
        yield
        self.add(Phase(name, begun, time.time() - begun))
