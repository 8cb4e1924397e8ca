"""Where pictures are read from: a local folder, or a bucket or web server (s3://, gs://, abfs://, https://, ...).

A name is told from the root, with "/" between its parts, and never leads out of it.
"""

import os
import time
from pathlib import PurePosixPath
from typing import Any, Protocol

import numpy as np

ATTEMPTS, FIRST_WAIT = 5, 0.5  # of a read over a network: 0.5, 1, 2, 4 seconds between them


class Files(Protocol):
    """Files below a root."""

    root: str

    def read(self, name: str) -> bytes:
        """FileNotFoundError: there is none. PermissionError: a link out of the root. ConnectionError: not now."""
        ...

    def stamp(self, name: str) -> str:
        """Changes when the file does; empty where that would need a request a file."""
        ...


def below(root: str, links: bool = False) -> Files:
    """The files below a folder or URL. links: follow symbolic links that lead out of the folder."""
    return RemoteFiles(root) if "://" in root else LocalFiles(root, links)


def check_names(names: np.ndarray, source: str) -> None:
    """ValueError for names that climb out of the root or that begin at another one. names: (N,) strings."""
    elsewhere = np.strings.find(names, "://") >= 0
    for start in ("/", "\\", "~"):
        elsewhere |= np.strings.startswith(names, start)
    for place in np.flatnonzero(np.strings.find(names, "..") >= 0):
        elsewhere[place] |= ".." in PurePosixPath(names[place]).parts
    if elsewhere.any():
        raise ValueError(f"{source}: {elsewhere.sum()} paths lead out of the root, {names[elsewhere][0]!r} first")


class LocalFiles:
    """Of a folder on this machine or a file system that it mounts."""

    def __init__(self, root: str, links: bool = False):
        self.root, self.links = root, links
        self.real = os.path.realpath(root) + os.sep

    def read(self, name: str) -> bytes:
        path = os.path.join(self.root, name)
        if not self.links and not os.path.realpath(path).startswith(self.real):
            raise PermissionError("a link out of data.root; data.links=true allows it")
        with open(path, "rb") as file:
            return file.read()

    def stamp(self, name: str) -> str:
        try:
            status = os.stat(os.path.join(self.root, name))
        except OSError:
            return "missing"
        return f"{status.st_size} {status.st_mtime_ns}"


class RemoteFiles:
    """Through fsspec. A read that fails is tried again, with growing waits."""

    def __init__(self, root: str):
        self.root = root.rstrip("/")
        self.opened: tuple[int, Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"opened": None}

    def system(self) -> tuple[Any, str]:
        """fsspec's file system, one a process as its event loop survives no fork, and the root as that calls it.

        ValueError where the package that speaks to it is not installed.
        """
        if self.opened is None or self.opened[0] != os.getpid():
            import fsspec

            try:
                self.opened = os.getpid(), *fsspec.core.url_to_fs(self.root)
            except (ImportError, ValueError) as error:
                raise ValueError(f"{self.root}: {error}") from None
        return self.opened[1:]

    def read(self, name: str) -> bytes:
        system, root = self.system()
        for attempt in range(ATTEMPTS):
            try:
                return system.cat_file(f"{root}/{name}")
            except FileNotFoundError:
                raise
            except Exception as error:  # each system has exceptions of its own
                if attempt + 1 == ATTEMPTS:
                    reason = f"{self.root}/{name}: {ATTEMPTS} attempts failed ({type(error).__name__}: {error})"
                    raise ConnectionError(reason) from None
                time.sleep(FIRST_WAIT * 2**attempt)
        raise AssertionError

    def stamp(self, name: str) -> str:
        return ""
