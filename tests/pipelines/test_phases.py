"""The phases of a command add up, and phases of another process or thread stand beside them."""

import time

import pytest

from pipelines.phases import Clock, Phase


def test_laps_follow_each_other_and_those_of_one_name_are_one_phase() -> None:
    started = time.time() - 10
    clock = Clock(started)
    clock.lap("imports")
    for _ in range(2):
        time.sleep(0.01)
        clock.lap("steps")
        clock.lap("validation")
    phases = clock.phases
    assert [*phases] == ["imports", "steps", "validation"]
    assert phases["imports"].begun == started and phases["imports"].seconds == pytest.approx(10, abs=0.5)
    assert phases["steps"].seconds >= 0.02 and phases["steps"].begun == pytest.approx(started + 10, abs=0.5)
    assert sum(phase.seconds for phase in phases.values()) == pytest.approx(clock.last - started)


def test_a_phase_beside_others_and_one_of_another_process() -> None:
    clock = Clock()
    with clock.beside("data"):
        time.sleep(0.01)
    clock.add(Phase("workers", 5.0, 2.0))
    clock.lap("Ray")
    assert [*clock.phases] == ["data", "workers", "Ray"] and clock.phases["workers"] == ("workers", 5.0, 2.0)
    assert clock.phases["data"].seconds <= clock.phases["Ray"].seconds
