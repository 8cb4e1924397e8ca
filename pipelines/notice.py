"""A notice that a node is about to be taken away (a spot instance, a drain): what is not stored until then is lost."""

from typing import Any

seen: Any = None


def new() -> bool:
    """Whether this worker of Ray Train has been told of one since the last look.

    ray.train.get_preemption_info would say the same, but has all workers meet in an actor, at every step; here rank 0
    alone looks, into its own process, as it alone stores checkpoints.
    """
    global seen
    from ray.train.v2._internal.execution.context import get_train_context

    try:
        found = get_train_context().preemption_context.preemption_info
    except RuntimeError:  # no worker of Ray Train
        return False
    found, seen = found != seen, found
    return found and seen is not None
