"""Where pictures are read from: a local folder, or a bucket or web server (s3://, gs://, abfs://, https://, ...).

A name is relative to the root, with "/" between its parts, and never leads out of it.
"""

import errno
import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.dtypes import StringDType

# Of one file, and not of the server or the network: what another attempt would not change.
OF_ONE_FILE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
ERRNOS_OF_ONE_FILE = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
STATUSES_TO_TRY_AGAIN = (408, 425, 429)  # of HTTP, below 500
ATTEMPTS, FIRST_WAIT = 5, 0.5  # of a read over a network; seconds: 0.5, 1, 2, 4 between the attempts
REQUESTS = 32  # to a server at a time
FEW = 1000  # files that are asked about one by one, where more are listed

# What file systems of fsspec call a checksum or ETag of a file, and the time of its last change, in lower case.
CHECKSUMS = ("etag", "content-md5", "md5hash", "blob_id", "crc")
TIMES = ("mtime", "lastmodified", "last_modified", "last-modified", "modified", "updated", "created")

Answer = TypeVar("Answer")


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

    def stamps(self, names: np.ndarray) -> np.ndarray:
        """Return a text for each file that changes when the file does.

        Args:
            names: (N,) strings.

        Returns:
            (N,) strings; empty where nothing but the content of a file tells.
        """
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

    def stamps(self, names: np.ndarray) -> np.ndarray:
        def stamp(name: str) -> str:
            try:
                status = os.stat(os.path.join(self.root, name))
            except (OSError, ValueError):  # ValueError: a name that no file can have
                return "missing"
            return f"{status.st_size} {status.st_mtime_ns}"

        return np.array([stamp(name) for name in names], StringDType())


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
            self._connection[1].invalidate_cache()  # fsspec's lists, from an earlier run of this process
        return self._connection[1:]

    def read(self, name: str) -> bytes:
        system, root = self.system()
        return self._ask(name, lambda: system.cat_file(f"{root}/{name}"))

    def stamps(self, names: np.ndarray) -> np.ndarray:
        system, root = self.system()
        listed = self._list_folder_of(names) if len(names) > FEW else {}

        def ask(name: str) -> str:
            try:
                return _stamp(self._ask(name, lambda: system.info(f"{root}/{name}")))
            except ConnectionError:
                raise
            except (OSError, ValueError):  # there is no such file, or its server only answers to reading
                return ""

        stamps = np.array([_stamp(listed.get(f"{root}/{name}", {})) for name in names], StringDType())
        unknown = np.flatnonzero(stamps == "")
        with ThreadPoolExecutor(REQUESTS) as threads:
            stamps[unknown] = np.array([*threads.map(ask, names[unknown].tolist())], StringDType())
        return stamps

    def _list_folder_of(self, names: np.ndarray) -> Mapping[str, Mapping[str, Any]]:
        """List the lowest folder that has all files, with what the listing tells of each; nothing where none can be."""
        system, root = self.system()
        if "http" in system.protocol:  # pages of links, which tell nothing of files
            return {}
        first, last = min(names), max(names)
        folder = os.path.commonpath([os.path.dirname(first), os.path.dirname(last)])
        try:
            return system.find(f"{root}/{folder}".rstrip("/"), detail=True)
        except Exception:  # each file system has exceptions of its own
            logging.getLogger(__name__).info("%s/%s cannot be listed", self.root, folder, exc_info=True)
            return {}

    def _ask(self, name: str, call: Callable[[], Answer]) -> Answer:
        """Call what asks the server about a file, again where it fails. The errors are those of `read`."""
        if "\0" in name:
            raise ValueError("no file can have a name with a null byte in it")
        for attempt in range(ATTEMPTS):
            try:
                return call()
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


def _stamp(info: Mapping[str, Any]) -> str:
    """Return the stamp of a file from what fsspec tells of it; empty where it tells neither a checksum nor a time."""
    facts = {key.lower(): value for key, value in info.items() if value}
    for key in CHECKSUMS:
        if key in facts:
            return str(facts[key])
    return next((f"{facts.get('size', 0)} {facts[key]}" for key in TIMES if key in facts), "")
