"""Which files of the working folder travel to a cluster with a submitted job."""

import fnmatch
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

LARGEST_FILE = 10 * 2**20  # bytes of a file

LARGEST_FOLDER = 100 * 2**20  # bytes of all: Ray keeps them in its head's memory

LEFT_OUT = (
    *(".git", ".venv", "venv", "node_modules", "__pycache__", "*.egg-info", "build", "dist", ".ipynb_checkpoints"),
    *(".*_cache", ".hypothesis", "runs", "mlruns", "mlartifacts", "mlflow.db*"),
    *("*.jpg", "*.jpeg", "*.png", "*.webp", "*.gif", "*.bmp", "*.tif", "*.tiff", "*.zip", "*.tar", "*.tgz", "*.gz"),
    *("*.npy", "*.npz", "*.mat", "*.pt", "*.pth", "*.ckpt", "*.safetensors", "*.faiss", "*.onnx"),
)

SECRET = (
    *(".env", ".env.*", "*.env", ".envrc", ".netrc", ".npmrc", ".pypirc", ".git-credentials", ".htpasswd"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.kdbx", "*.tfstate", "*.tfvars", "*.ovpn"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "known_hosts", "kubeconfig*", "*credential*", "*secret*"),
    *(".ssh", ".aws", ".azure", ".gcloud", ".kube", ".docker", ".gnupg", "*token", "*.token", "*password*"),
)


class FolderFiles(NamedTuple):
    """Files of a folder, by relative paths: those that travel, and those that stay as they look like secrets or are too
    large."""

    files: list[Path]
    secret: list[Path]
    large: list[Path]


def travelling_files(folder: Path) -> FolderFiles:
    """List what of a folder travels; files that git ignores, and links, stay.

    Raises:
        ValueError: More than LARGEST_FOLDER would travel.
    """
    listing = FolderFiles([], [], [])
    for path in sorted(_list_files(folder)):
        if _is_left_out(folder, path) or (folder / path).is_symlink():
            continue
        if any(_matches(part, SECRET) for part in path.parts):
            listing.secret.append(path)
        elif (folder / path).is_file():
            (listing.large if (folder / path).stat().st_size > LARGEST_FILE else listing.files).append(path)
    if (size := sum((folder / path).stat().st_size for path in listing.files)) > LARGEST_FOLDER:
        largest = max(listing.files, key=lambda path: (folder / path).stat().st_size)
        raise ValueError(
            f"{folder}: {len(listing.files)} files of {size >> 20} MiB would travel, at most "
            f"{LARGEST_FOLDER >> 20} MiB can; the largest is {largest}. Submit from a folder of your recipes, or list "
            f"what shall stay in .gitignore"
        )
    return listing


def _list_files(folder: Path) -> list[Path]:
    """All files, or in a git checkout those that git does not ignore."""
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [Path(name) for name in output.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        paths = []
        for parent, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if not _is_left_out(folder, Path(parent, name).relative_to(folder))]
            paths += [Path(parent, name).relative_to(folder) for name in files]
        return paths


def _is_left_out(folder: Path, path: Path) -> bool:
    """Return whether a part of a path has a name of LEFT_OUT; a folder of Python code may have any name."""
    parts = [*path.parents[-2::-1], path]  # the outermost first, without the folder itself
    return any(_matches(part.name, LEFT_OUT) and not (folder / part / "__init__.py").is_file() for part in parts)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in patterns)
