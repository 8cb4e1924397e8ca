"""What the processes of one run of the tests share: made by the first that needs it, ended by the last that used it."""

import fcntl
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psutil

Made = TypeVar("Made")


@contextmanager
def locked(folder: Path, name: str) -> Iterator[Path]:
    """Keep the other processes out for the time of the block. Yields where what is known of `name` is kept."""
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder / f"{name}.pickle"


def make_once(folder: Path, name: str, make: Callable[[], Made]) -> Made:
    """Return what `make` returned in the first process that asked for `name`; the others wait for it."""
    with locked(folder, name) as path:
        if not path.exists():
            path.write_bytes(pickle.dumps(make()))
        return pickle.loads(path.read_bytes())


def join(folder: Path, name: str, pid: int, start: Callable[[], Made]) -> Made:
    """Return what `start` returned in the first process that joined, if one that joined is still alive."""
    with locked(folder, name) as path:
        users, service = pickle.loads(path.read_bytes()) if path.exists() else ((), None)
        users = tuple(user for user in users if psutil.pid_exists(user))
        if not users or service is None:
            service = start()
        path.write_bytes(pickle.dumps(((*users, pid), service)))
        return service


def leave(folder: Path, name: str, pid: int, stop: Callable[[], object]) -> None:
    """Call `stop` if no other process that joined is alive."""
    with locked(folder, name) as path:
        users, service = pickle.loads(path.read_bytes())
        users = tuple(user for user in users if user != pid and psutil.pid_exists(user))
        if not users:
            stop()
        path.write_bytes(pickle.dumps((users, service if users else None)))
