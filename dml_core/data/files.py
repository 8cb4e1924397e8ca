"""Where pictures are read from: a local folder, or a bucket or web server (s3://, gs://, abfs://, https://, ...).

A name is relative to the root, with "/" between its parts, and never leads out of it.
"""

import errno
import logging
import os
import time
from pathlib import PurePosixPath
from typing import Any, Protocol

import numpy as np

# Of one file, and not of the server or the network: what another attempt would not change.
OF_ONE_FILE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
ERRNOS_OF_ONE_FILE = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
STATUSES_TO_TRY_AGAIN = (408, 425, 429)  # of HTTP, below 500
ATTEMPTS, FIRST_WAIT = 5, 0.5  # of a read over a network; seconds: 0.5, 1, 2, 4 between the attempts


class Files(Protocol):
    """Files below a root."""

    root: str

    def read(self, name: str) -> bytes:
        """Read a file.

        Raises:
            FileNotFoundError: There is none of this name.
            PermissionError: A link leads out of the root, or this user may not read it.
            OSError, ValueError: No file can have this name, or this one is damaged.
            ConnectionError: It cannot be read now.
        """
        ...

    def stamp(self, name: str) -> str:
        """Return a text that changes when the file does; empty where that would need a request for each file."""
        ...


def below(root: str, links: bool = False) -> Files:
    """Return access to the files below a folder or URL.

    Args:
        root: The folder or URL.
        links: Whether symbolic links that lead out of the folder are followed.
    """
    return RemoteFiles(root) if "://" in root else LocalFiles(root, links)


def check_names(names: np.ndarray, source: str) -> None:
    """Check that no name leads out of the root.

    Args:
        names: (N,) strings.
        source: Where the names come from, for the error.

    Raises:
        ValueError: Names have ".." in them, or begin at another root.
    """
    outside = np.strings.find(names, "://") >= 0
    for start in ("/", "\\", "~"):
        outside |= np.strings.startswith(names, start)
    for index in np.flatnonzero(np.strings.find(names, "..") >= 0):
        outside[index] |= ".." in PurePosixPath(names[index]).parts
    if outside.any():
        raise ValueError(f"{source}: {outside.sum()} paths lead out of the root, {names[outside][0]!r} first")


class LocalFiles:
    """The files below a folder on this machine or on a file system that it mounts."""

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
        except (OSError, ValueError):  # ValueError: no file can have this name
            return "missing"
        return f"{status.st_size} {status.st_mtime_ns}"


class RemoteFiles:
    """The files below a URL, read through fsspec. A read that fails is tried again, with growing waits."""

    def __init__(self, root: str):
        self.root = root.rstrip("/")
        self._connection: tuple[int, Any, str] | None = None  # process id, file system, root

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_connection": None}

    def system(self) -> tuple[Any, str]:
        """Return fsspec's file system and the root in its notation, new in each process: event loops survive no fork.

        Raises:
            ValueError: The package for this kind of URL is not installed.
        """
        if self._connection is None or self._connection[0] != os.getpid():
            import fsspec

            try:
                self._connection = os.getpid(), *fsspec.core.url_to_fs(self.root)
            except (ImportError, ValueError) as error:
                raise ValueError(f"{self.root}: {error}") from None
        return self._connection[1:]

    def read(self, name: str) -> bytes:
        if "\0" in name:
            raise ValueError("no file can have a name with a null byte in it")
        system, root = self.system()
        for attempt in range(ATTEMPTS):
            try:
                return system.cat_file(f"{root}/{name}")
            except OF_ONE_FILE:
                raise
            except Exception as error:  # each file system has exceptions of its own
                if isinstance(error, OSError) and error.errno in ERRNOS_OF_ONE_FILE:
                    raise
                status = getattr(error, "status", None)  # of an answer over HTTP
                if status and 400 <= status < 500 and status not in STATUSES_TO_TRY_AGAIN:
                    raise PermissionError(f"the server answers {status}") from None
                logging.getLogger(__name__).info("attempt to read %s/%s failed", self.root, name, exc_info=True)
                if attempt + 1 == ATTEMPTS:
                    reason = f"{self.root}/{name}: {ATTEMPTS} attempts failed ({type(error).__name__}: {error})"
                    raise ConnectionError(reason) from None
                time.sleep(FIRST_WAIT * 2**attempt)
        raise AssertionError

    def stamp(self, name: str) -> str:
        return ""
