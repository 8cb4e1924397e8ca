"""Everything that we use of Ray's internals, one function each, for which Ray 2.60 has no public way.

tests/pipelines/cluster/test_ray_private.py holds each of them against the installed Ray.
"""

import logging

# Loggers of Ray that print while a job's files travel; what matters is told by us.
UPLOAD_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
STORAGE_NOT_SHARED = "Unable to set up cluster storage"


def preemption_notice() -> object | None:
    """Return the notice that this worker's node is about to be taken away; None where there is none.

    `ray.train.get_preemption_info` says the same, but has all workers meet in an actor at each call. This reads the
    worker's own memory, so that rank 0 can look at every step.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    try:
        return get_train_context().preemption_context.preemption_info
    except RuntimeError:  # not a worker of Ray Train
        return None


def address_on_this_machine() -> str:
    """Return HOST:PORT of the Ray on this machine that RAY_ADDRESS=auto stands for. ConnectionError: there is none."""
    from ray._private.services import get_ray_address_from_environment

    try:
        return get_ray_address_from_environment("auto", None)
    except ConnectionError:
        raise ConnectionError("none runs on this machine") from None


def means_storage_not_shared(error: BaseException) -> bool:
    """Whether Ray Train, which looks on each node that has a worker, did not find the run's folder there.

    It raises a RuntimeError whose text is all that sets it apart.
    """
    return STORAGE_NOT_SHARED in str(error)


def silence_uploads() -> None:
    """Keep Ray's job client from printing how files travel; Ray has no setting for it."""
    for name in UPLOAD_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
