"""Each of the names of Ray's internals that we rely on, against the installed Ray: what moved is named here."""

import importlib
import logging
from pathlib import Path

import pytest
import ray
import ray.train
from ray.train.torch import TorchTrainer

from pipelines.cluster import ray_private
from pipelines.cluster.failures import first_cause
from pipelines.cluster.ray_private import means_storage_not_shared, preemption_notice

MOVED = f"Ray {ray.__version__} has moved it: mend pipelines/cluster/ray_private.py"


def test_there_is_no_notice_outside_workers() -> None:
    assert preemption_notice() is None, MOVED


def look_for_notice() -> bool:
    """In a worker. Whether the place where a notice would stand is there, and empty."""
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is None and preemption_notice() is None


def look_for_notice_and_fail() -> None:
    assert look_for_notice(), MOVED
    raise LookupError("first line\nsecond line")


def trainer(loop, folder: Path) -> TorchTrainer:
    run = ray.train.RunConfig(name="private", storage_path=str(folder))
    return TorchTrainer(loop, scaling_config=ray.train.ScalingConfig(num_workers=1), run_config=run)


def test_a_worker_can_look_for_a_notice_and_the_first_cause_of_a_failure_is_what_the_loop_raised(
    local_ray: None, tmp_path: Path
) -> None:
    with pytest.raises(ray.train.WorkerGroupError) as raised:
        trainer(look_for_notice_and_fail, tmp_path).fit()
    assert first_cause(raised.value) == "LookupError: first line"


def test_ray_says_in_these_words_that_storage_is_not_shared() -> None:
    source = Path(importlib.import_module("ray.train.v2._internal.execution.storage").__file__ or "").read_text()
    assert ray_private.STORAGE_NOT_SHARED in source, MOVED
    assert means_storage_not_shared(RuntimeError(f"{ray_private.STORAGE_NOT_SHARED}: no marker"))


def test_loggers_of_uploads_are_those_of_ray() -> None:
    for name in ray_private.UPLOAD_LOGGERS:
        source = Path(importlib.import_module(name).__file__ or "").read_text()
        assert "getLogger(__name__)" in source, MOVED
    ray_private.silence_uploads()
    assert not logging.getLogger(ray_private.UPLOAD_LOGGERS[0]).isEnabledFor(logging.INFO)
