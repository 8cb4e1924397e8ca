"""List the files below a folder or URL, tell the pictures of a set from the rest, and count the rest by reason."""

import fnmatch
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dml_core.data.files import RemoteFiles
from dml_core.data.pictures import picture_endings

# What file systems, archives and programs put between pictures, beside names that begin with a dot; in lower case.
JUNK = {
    *("@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "recycler", "system volume information"),
    *("__macosx", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__pycache__"),
}
EXCLUDED = "data.exclude"
BESIDE, UNMATCHED = "pictures beside the class folders", "names without a match of data.pattern"
PLUGINS_FOR = {".heic": "pillow-heif", ".heif": "pillow-heif", ".hif": "pillow-heif", ".jxl": "pillow-jxl-plugin"}
MOST_REASONS = 8  # in one line


@dataclass
class Listing:
    """What lies below a folder or URL; all names are relative to it, with "/" between their parts.

    Attributes:
        files: Names of the files, in the order of their parts.
        folders: Names of the folders; those of a bucket, which has none without files, are not known.
        unreadable: Name of each entry that cannot be a part of a set -> why.
        outside: Symbolic links that lead out of the root, and were not followed.
    """

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)


def list_files(root: str, links: bool = False) -> Listing:
    """List all that lies below a local folder, or below a URL that can be listed.

    Args:
        root: The folder or URL.
        links: Whether symbolic links that lead out of a local root are followed.

    Raises:
        ValueError: There is no such folder, or it cannot be listed.
    """
    if "://" not in root:
        return _list_folder(root, root, links)
    system, path = RemoteFiles(root).system()
    if "file" in (system.protocol, *system.protocol):
        return _list_folder(root, path, links)
    try:
        paths = system.find(path)
    except Exception as error:  # each file system has exceptions of its own
        logging.getLogger(__name__).info("%s cannot be listed", root, exc_info=True)
        reason = (str(error) or "no reason is given").splitlines()[0]
        raise ValueError(f"data.root={root}: cannot be listed ({type(error).__name__}: {reason})") from None
    names = (found.removeprefix(path).lstrip("/") for found in paths)
    listing = Listing(sorted((name for name in names if name and name[-1] != "/"), key=lambda name: name.split("/")))
    listing.folders = [*dict.fromkeys(above for name in listing.files for above in _folders_of(name))]
    return listing


def _folders_of(name: str) -> list[str]:
    """Return the folders that a file lies in, outermost first."""
    return [name[:end] for end, letter in enumerate(name) if letter == "/"]


def _list_folder(root: str, path: str, links: bool) -> Listing:
    """List a local folder. root: as the user wrote it; path: where it is."""
    if not os.path.isdir(path):
        if os.path.isfile(path):
            raise ValueError(f"data.root={root}: not a folder but a file; a table is read by data.table=FILE")
        raise ValueError(f"data.root={root}: no such folder")
    real, listing = os.path.realpath(path) + os.sep, Listing()

    def walk(folder: str, prefix: str, above: tuple[str, ...]) -> None:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if not prefix:
                raise ValueError(f"data.root={root}: cannot be listed ({error.strerror})") from None
            listing.unreadable[prefix[:-1]] = error.strerror or str(error)
            return
        for entry in entries:
            name, target = prefix + entry.name, entry.path
            if not entry.name.isascii() and (escaped := _escaped(entry.name)) != entry.name:
                listing.unreadable[prefix + escaped] = "its name is not UTF-8; rename it (convmv -t utf8)"
                continue
            if entry.is_symlink():
                target = os.path.realpath(entry.path)
                if not links and not (target + os.sep).startswith(real):
                    listing.outside.append(name)
                    continue
                if target in above:  # a circle
                    continue
            if _is_folder(entry):
                listing.folders.append(name)
                walk(entry.path, name + "/", (*above, target))
            elif entry.is_symlink() or entry.is_file():
                listing.files.append(name)
            else:
                listing.unreadable[name] = "it is neither a file nor a folder"

    walk(path, "", (os.path.realpath(path),))
    return listing


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, for one, which is then found to be no picture when it is read
        return False


def _escaped(name: str) -> str:
    """Return a name with escapes for bytes that are not UTF-8, which no list of names can hold."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


class Sieve:
    """Keeps the pictures among names, and counts the others by reason.

    Attributes:
        passed_over: Reason -> how many files.
    """

    def __init__(self, exclude: Sequence[str] = ()):
        """Take glob patterns for names to leave out: of a file or folder, or, with "/" in it, of a whole path."""
        self.passed_over, self.exclude = Counter[str](), exclude
        self._folders = dict[str, str | None]({"": None})
        self._patterns = [
            ("/" in shortened, re.compile(fnmatch.translate(shortened)), f"{EXCLUDED} {pattern}")
            for pattern in exclude
            for shortened in [pattern.removeprefix("./").removeprefix("**/").removesuffix("/")]
        ]

    def keeps(self, name: str) -> bool:
        """Whether a file in a folder is a picture of the set; it is counted if not."""
        reason = self.reason(name)
        if reason is None:
            base = name.rpartition("/")[2]
            ending = os.path.splitext(base)[1].lower()
            if ending not in picture_endings():
                reason = f"files that end with {ending}" if ending else "files without an ending"
        if reason is not None:
            self.passed_over[reason] += 1
        return reason is None

    def keeps_row(self, name: str) -> bool:
        """Whether a file that a table lists is one of the set; it is counted if not."""
        reason = self._excluded(name)
        if reason is not None:
            self.passed_over[reason] += 1
        return reason is None

    def reason(self, name: str) -> str | None:
        """Return why a file or folder is none of the set's, by its name and those of the folders above."""
        folder = name.rpartition("/")[0]
        if folder not in self._folders:
            self._folders[folder] = self.reason(folder)
        return self._folders[folder] or self._junk(name.rpartition("/")[2]) or self._matches(name)

    def _junk(self, base: str) -> str | None:
        if base.lower() in JUNK:
            return f"files in or named {base.strip()}"
        return "files with a dot name" if base.startswith(".") else None

    def _matches(self, name: str) -> str | None:
        base = name.rpartition("/")[2]
        return next((why for whole, regex, why in self._patterns if regex.match(name if whole else base)), None)

    def _excluded(self, name: str) -> str | None:
        if not self._patterns:
            return None
        return next((why for part in (*_folders_of(name), name) if (why := self._matches(part))), None)

    def notes(self) -> list[str]:
        """Return lines on what was passed over, and on patterns that match nothing."""
        lines = [line] if (line := describe_passed_over(self.passed_over)) else []
        idle = [
            pattern
            for pattern, (_, _, why) in zip(self.exclude, self._patterns, strict=True)
            if not self.passed_over[why]
        ]
        if idle:
            lines.append(
                f"data.exclude: {', '.join(idle)} matches no file; a pattern is of a file's or folder's name "
                f"or, with a / in it, of a path relative to data.root"
            )
        return lines


def describe_passed_over(passed_over: Mapping[str, int]) -> str:
    """Return one line that counts what was passed over, by reason; empty where there is nothing."""
    if not passed_over:
        return ""
    reasons = sorted(passed_over.items(), key=lambda item: -item[1])
    counted = [f"{count:,} {reason}" for reason, count in reasons[:MOST_REASONS]]
    if rest := reasons[MOST_REASONS:]:
        counted.append(f"{sum(count for _, count in rest):,} of {len(rest)} other kinds")
    endings = {reason.rpartition(" ")[2] for reason in passed_over}
    hints = sorted({f"pip install {plugin} reads {end}" for end, plugin in PLUGINS_FOR.items() if end in endings})
    return f"passed over: {', '.join(counted)}" + (f" ({'; '.join(hints)})" if hints else "")
