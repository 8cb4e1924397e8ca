"""A loop in this process: when, and how it ends."""

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from pipelines.cluster.devices import needs_ray
from pipelines.cluster.in_process import run_in_process
from pipelines.cluster.worker import Job, PreemptionWatch
from pipelines.config.recipe import load_recipe
from pipelines.console import QUIET, RunFailed


@dataclass(frozen=True)
class CallJob(Job):
    """Calls the function of this module that it names."""

    loop: ClassVar[str] = "tests.pipelines.cluster.test_in_process:call"
    function: str = ""


def call(job: CallJob) -> object:
    return globals()[job.function](job)


def record_twice(job: Job) -> str:
    board = job.worker.board
    assert board is not None and not job.worker.is_of_ray_train
    for step in (1, 2):
        board.record([{"time": step, "step": step, "metrics": {}}])
    return "done"


def wait_for_a_signal(job: Job) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)


def fail(job: Job) -> None:
    torch.set_num_threads(1)
    raise ArithmeticError("the loss is not finite")


def job(function: str) -> CallJob:
    return CallJob(load_recipe("glyphs", []), function=function)


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (["workers=1"], False),
        (["workers=2"], True),
        (["workers=1:2"], True),
        (["workers=1", "max_failures=1"], True),
        (["workers=1", "max_failures=0"], False),
        (["workers=1", "data.name=folder", "data.root=.", "data.loader=ray"], True),
    ],
)
def test_ray_is_for_what_one_process_cannot_do(
    assignments: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    config = load_recipe("glyphs", assignments)
    assert needs_ray(config) is expected
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert needs_ray(config)


def test_every_record_is_handed_over_before_the_loop_has_ended() -> None:
    records: list[Any] = []
    assert run_in_process(job("record_twice"), QUIET, records.append) == "done"
    assert [record["step"] for record in records] == [1, 2]


def test_sigterm_stops_a_training_like_ctrl_c() -> None:
    assert threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_in_process(job("wait_for_a_signal"), QUIET)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_a_loop_raises_is_told_in_one_line_and_its_threads_are_given_back() -> None:
    threads = torch.get_num_threads()
    with pytest.raises(RunFailed, match=r"^ArithmeticError: the loss is not finite$"):
        run_in_process(job("fail"), QUIET)
    assert torch.get_num_threads() == threads


def test_nobody_gives_notice_to_a_process_that_is_not_ray_trains() -> None:
    assert PreemptionWatch(is_on=False).new_notice() is False
