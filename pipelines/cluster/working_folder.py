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


class Tree(NamedTuple):
    """files: that travel, relative.  secret, large: that would, but for how they look, and for their size."""

    files: list[Path]
    secret: list[Path]
    large: list[Path]


def travelling_files(folder: Path) -> Tree:
    """What of a folder travels. ValueError where it is too much. Git's ignored files and links stay."""
    found = Tree([], [], [])
    for path in sorted(_listed(folder)):
        if any(_matches(part, LEFT_OUT) for part in path.parts) or (folder / path).is_symlink():
            continue
        if any(_matches(part, SECRET) for part in path.parts):
            found.secret.append(path)
        elif (folder / path).is_file():
            (found.large if (folder / path).stat().st_size > LARGEST_FILE else found.files).append(path)
    if (size := sum((folder / path).stat().st_size for path in found.files)) > LARGEST_FOLDER:
        first = max(found.files, key=lambda path: (folder / path).stat().st_size)
        raise ValueError(
            f"{folder}: {len(found.files)} files of {size >> 20} MiB would travel, at most {LARGEST_FOLDER >> 20} MiB can; "
            f"the largest is {first}. Submit from a folder of your recipes, or list what shall stay in .gitignore"
        )
    return found


def _listed(folder: Path) -> list[Path]:
    """All files, or in a git checkout those that git does not ignore."""
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [Path(name) for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        found = []
        for parent, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if not _matches(name, LEFT_OUT)]
            found += [Path(parent, name).relative_to(folder) for name in files]
        return found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in patterns)
