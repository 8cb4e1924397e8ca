"""What a failure is told with: advice that fits, and that the same command continues it only where that helps."""

import errno
import os
import pickle
import re

import pytest
import ray
import typer

from dml_core.data.pictures import BadPicture
from pipelines.cli.endings import exit_on_error
from pipelines.cluster.failures import LOST_PEER, REMEDIES, explain_failure
from pipelines.cluster.ray_private import STORAGE_NOT_SHARED
from pipelines.console import RunFailed

HINT = "the same command again continues it"


class OfWorkers(Exception):
    """As of Ray Train: each worker's error by its rank."""

    def __init__(self, *errors: Exception):
        self.worker_failures = dict(enumerate(errors))


LOST = RuntimeError(f"[gloo] {LOST_PEER} [10.0.0.1]:12345")


@pytest.mark.parametrize(
    ("error", "advice", "goes_on"),
    [
        (ArithmeticError("the loss is not finite at epoch 2, step 3; try a lower optimizer.lr"), "optimizer.lr", False),
        (OfWorkers(LOST, ArithmeticError("the loss is not finite at epoch 2")), "the loss is not finite", False),
        (ValueError("query: 3 of 9 embeddings are not finite"), "lower optimizer.lr, by another name", False),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB."), "more batch.slices", False),
        (RuntimeError(f"{STORAGE_NOT_SHARED}: no marker"), "storage=s3://BUCKET/runs", False),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x"), "make room", True),
        (MemoryError(), "fewer workers", True),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "data.loader_processes", True),
        (RuntimeError("[gloo] Timed out waiting 600000ms for recv"), "a larger timeout= waits longer", True),
        (OfWorkers(LOST, LOST), LOST_PEER, True),
        (OSError("s3://b/x.png: 5 attempts failed (timed out)"), "5 attempts failed", True),
        (ray.exceptions.WorkerCrashedError(), "died", True),
        (KeyError("a fault of ours"), "KeyError", False),
        (AssertionError("shapes"), "shapes", False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failure_says_what_to_do(
    error: Exception, advice: str, goes_on: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = explain_failure(error)
    assert advice in str(failed) and failed.goes_on is goes_on, str(failed)
    with pytest.raises(typer.Exit) as end, exit_on_error(HINT):
        raise failed
    said = capsys.readouterr().err
    assert end.value.exit_code == 1 and said.count("\n") == 1 and (HINT in said) is goes_on


def test_a_bad_picture_names_the_key_that_leaves_it_out() -> None:
    failed = explain_failure(BadPicture([("c/1.png", "truncated")]))
    assert "c/1.png" in str(failed) and "data.on_bad_image=skip" in str(failed) and not failed.goes_on


def test_a_failure_keeps_its_way_on_between_processes() -> None:
    assert pickle.loads(pickle.dumps(RunFailed("x", goes_on=True))).goes_on


def test_patterns_are_regular_expressions() -> None:
    assert all(re.compile(remedy.pattern) for remedy in REMEDIES)


def test_ctrl_c_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as end, exit_on_error(HINT):
        raise KeyboardInterrupt
    assert end.value.exit_code == 130 and HINT in capsys.readouterr().err
