"""What a process keeps from one run to the next, where all are of one sweep: sets and networks, as they were read.

Off unless `keep_between_runs` was called. What other processes read anew, as files may have changed, a sweep's trials
are to share: they are compared with each other.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

MOST_KEPT = 16  # folds, seeds and backbones that are in use at the same time are fewer

Value = TypeVar("Value")

_kept: OrderedDict[Hashable, Any] | None = None


def keep_between_runs() -> None:
    """Have this process keep what it makes through `once`, until it ends."""
    global _kept
    if _kept is None:
        _kept = OrderedDict()


@contextmanager
def keep_meanwhile() -> Iterator[None]:
    """Have this process keep what it makes through `once` for the time of the block: a set is listed once, not thrice.

    What it keeps for longer anyway, it goes on to keep.
    """
    global _kept
    if _kept is not None:
        yield
        return
    _kept = OrderedDict()
    try:
        yield
    finally:
        _kept = None


def forget() -> None:
    """Drop what is kept, and keep nothing from here on."""
    global _kept
    _kept = None


def once(key: Hashable, make: Callable[[], Value]) -> Value:
    """Return what was made for a key before in this process, or make it; see keep_between_runs.

    Args:
        key: All that the value depends on; its first entry says what it is.
        make: Makes the value, which nobody may change.
    """
    if _kept is None:
        return make()
    if key not in _kept:
        _kept[key] = make()
        if len(_kept) > MOST_KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    return _kept[key]
