"""`dml submit`: a command of ours as a job on a Ray cluster, by the Ray Jobs API.

What travels is the working folder, so that code, recipes and spaces that are tried out need no installation; but no
data, no caches, no results, and nothing that looks like a secret.
"""

import asyncio
import fnmatch
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from rich.console import Console

from pipelines.console import RunFailed

for _name in ("dashboard_sdk", "job.sdk"):  # how files travel; what matters is told by us
    logging.getLogger(f"ray.dashboard.modules.{_name}").setLevel(logging.WARNING)
logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
COMMANDS = ("train", "tune", "evaluate", "compare", "embed", "index")
LARGEST = 10 * 2**20  # bytes of a file
PATIENCE = 60.0  # seconds
MOST = 100 * 2**20  # bytes of all: Ray keeps them in its head's memory
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


class Job(NamedTuple):
    """What `dml submit --json` prints. code: of the command, once it has ended."""

    job_id: str
    status: str
    code: int | None
    entrypoint: str


def tree(folder: Path) -> Tree:
    """What of a folder travels. ValueError where it is too much. Git's ignored files and links stay."""
    found = Tree([], [], [])
    for path in sorted(_listed(folder)):
        if any(_matches(part, LEFT_OUT) for part in path.parts) or (folder / path).is_symlink():
            continue
        if any(_matches(part, SECRET) for part in path.parts):
            found.secret.append(path)
        elif (folder / path).is_file():
            (found.large if (folder / path).stat().st_size > LARGEST else found.files).append(path)
    if (size := sum((folder / path).stat().st_size for path in found.files)) > MOST:
        first = max(found.files, key=lambda path: (folder / path).stat().st_size)
        raise ValueError(
            f"{folder}: {len(found.files)} files of {size >> 20} MiB would travel, at most {MOST >> 20} MiB can; the "
            f"largest is {first}. Submit from a folder of your recipes, or list what shall stay in .gitignore"
        )
    return found


def submit(address: str, arguments: Sequence[str], environment: Mapping[str, str], console: Console) -> Job:
    """Start `dml ARGUMENTS` on the cluster. ValueError: no command of ours, or no job server; RunFailed: it refuses."""
    if not arguments or arguments[0] not in COMMANDS:
        raise ValueError(f"-- {' '.join(arguments[:1]) or 'nothing'}: after -- comes one of {', '.join(COMMANDS)}")
    client, folder = connect(address), Path.cwd()
    found = tree(folder)
    if arguments[0] in ("train", "tune") and not any(a.startswith("storage=") for a in arguments):
        console.print(
            "storage= is not given: results stay in the job's folder on the head node, where no other node sees them",
            style="yellow",
        )
    for what, paths in (("may hold a secret", found.secret), (f"larger than {LARGEST >> 20} MiB", found.large)):
        if paths:
            console.print(f"stays here, {what}: {', '.join(map(str, paths[:5]))}{' ...' if paths[5:] else ''}")
    entrypoint = shlex.join(["python", "-m", "pipelines.cli", *arguments])
    with tempfile.TemporaryDirectory(prefix="dml-") as travels:
        for path in found.files:
            (travels / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / path, travels / path)
        given = {"working_dir": travels, "env_vars": dict(environment)}
        job_id = _started(client, entrypoint, given)
    console.print(f"{job_id}: {len(found.files)} files sent; dml submit logs {job_id} --address {address}")
    return Job(job_id, JobStatus.PENDING, None, entrypoint)


def _started(client: JobSubmissionClient, entrypoint: str, runtime_env: dict[str, Any]) -> str:
    """The job's id. A cluster that has just been started answers before it can take a job: then once more."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise RunFailed(f"the job server refuses: {str(error).strip().splitlines()[-1]}") from error
            time.sleep(1)


def follow(address: str, job_id: str) -> Job:
    """Print a job's output until it ends."""
    client = connect(address)

    async def tail() -> None:
        async for text in client.tail_job_logs(job_id):
            print(text, end="", flush=True)

    asyncio.run(tail())
    return ended(client, job_id)


def ended(client: JobSubmissionClient, job_id: str) -> Job:
    """How a job stands. ValueError where there is none of that id."""
    info = _known(client, job_id)
    code = info.driver_exit_code
    if code is None and info.status in (JobStatus.FAILED, JobStatus.STOPPED):
        code = 1
    return Job(job_id, info.status, code, info.entrypoint)


def logs(address: str, job_id: str) -> str:
    client = connect(address)
    _known(client, job_id)
    return client.get_job_logs(job_id)


def stop(address: str, job_id: str) -> Job:
    client = connect(address)
    _known(client, job_id)
    client.stop_job(job_id)
    return ended(client, job_id)


def jobs(address: str) -> list[Job]:
    """Those submitted, the newest first."""
    found = [job for job in connect(address).list_jobs() if job.submission_id]
    found.sort(key=lambda job: job.start_time or 0, reverse=True)
    return [Job(str(job.submission_id), job.status, job.driver_exit_code, job.entrypoint) for job in found]


def connect(address: str) -> JobSubmissionClient:
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"--address {address}: the job server's, such as http://127.0.0.1:8265")
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"--address {address}: no job server of Ray's answers ({reason})") from None


def _known(client: JobSubmissionClient, job_id: str) -> JobDetails:
    try:
        return client.get_job_info(job_id)
    except RuntimeError:
        raise ValueError(f"{job_id}: no job of that id; dml submit list names them") from None


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
