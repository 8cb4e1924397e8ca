"""`dml submit`: a command of ours as a job on a Ray cluster, by the Ray Jobs API.

What travels is the working folder, so that code, recipes and spaces that are tried out need no installation; but no
data, no caches, no results, and nothing that looks like a secret.
"""

import asyncio
import json
import shlex
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from rich.console import Console

from pipelines.cluster.address import PATIENCE_S
from pipelines.cluster.ray_private import silence_uploads
from pipelines.cluster.working_folder import LARGEST_FILE, travelling_files
from pipelines.console import RunFailed

COMMANDS = ("train", "tune", "evaluate", "compare", "embed", "index")

START_PATIENCE = 60.0  # seconds


class SubmittedJob(NamedTuple):
    """What `dml submit --json` prints. code: of the command, once it has ended."""

    job_id: str
    status: str
    code: int | None
    entrypoint: str


def submit_job(
    address: str, arguments: Sequence[str], environment: Mapping[str, str], console: Console
) -> SubmittedJob:
    """Start `dml ARGUMENTS` on the cluster. ValueError: no command of ours, or no job server; RunFailed: it refuses."""
    if not arguments or arguments[0] not in COMMANDS:
        raise ValueError(f"-- {' '.join(arguments[:1]) or 'nothing'}: after -- comes one of {', '.join(COMMANDS)}")
    client, folder = connect_to_jobs(address), Path.cwd()
    listing = travelling_files(folder)
    if arguments[0] in ("train", "tune") and not any(a.startswith("storage=") for a in arguments):
        console.print(
            "storage= is not given: results stay in the job's folder on the head node, where no other node sees them",
            style="yellow",
        )
    too_large = f"larger than {LARGEST_FILE >> 20} MiB"
    for reason, paths in (("may hold a secret", listing.secret), (too_large, listing.large)):
        if paths:
            console.print(f"stays here, {reason}: {', '.join(map(str, paths[:5]))}{' ...' if paths[5:] else ''}")
    entrypoint = shlex.join(["python", "-m", "pipelines.cli", *arguments])
    with tempfile.TemporaryDirectory(prefix="dml-") as travels:
        for path in listing.files:
            (travels / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / path, travels / path)
        silence_uploads()
        runtime_env = {"working_dir": travels, "env_vars": dict(environment)}
        job_id = _start_job(client, entrypoint, runtime_env)
    console.print(f"{job_id}: {len(listing.files)} files sent; dml submit logs {job_id} --address {address}")
    return SubmittedJob(job_id, JobStatus.PENDING, None, entrypoint)


def _start_job(client: JobSubmissionClient, entrypoint: str, runtime_env: dict[str, Any]) -> str:
    """Start a job and return its id. A cluster that has just been started answers before it can take one: try again."""
    deadline = time.monotonic() + START_PATIENCE
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise RunFailed(f"the job server refuses: {str(error).strip().splitlines()[-1]}") from error
            time.sleep(1)


def follow_job(address: str, job_id: str) -> SubmittedJob:
    """Print a job's output until it ends."""
    client = connect_to_jobs(address)

    async def tail() -> None:
        async for text in client.tail_job_logs(job_id):
            print(text, end="", flush=True)

    asyncio.run(tail())
    return read_job(client, job_id)


def read_job(client: JobSubmissionClient, job_id: str) -> SubmittedJob:
    """Return how a job stands. ValueError where there is none of that id."""
    info = _job_details(client, job_id)
    code = info.driver_exit_code
    if code is None and info.status in (JobStatus.FAILED, JobStatus.STOPPED):
        code = 1
    return SubmittedJob(job_id, info.status, code, info.entrypoint)


def job_logs(address: str, job_id: str) -> str:
    """Return what a job has printed so far. ValueError where there is none of that id."""
    client = connect_to_jobs(address)
    _job_details(client, job_id)
    return client.get_job_logs(job_id)


def stop_job(address: str, job_id: str) -> SubmittedJob:
    """Ask a job to stop, and return how it stands. ValueError where there is none of that id."""
    client = connect_to_jobs(address)
    _job_details(client, job_id)
    client.stop_job(job_id)
    return read_job(client, job_id)


def list_jobs(address: str) -> list[SubmittedJob]:
    """List the jobs that were submitted, the newest first."""
    submitted = [job for job in connect_to_jobs(address).list_jobs() if job.submission_id]
    submitted.sort(key=lambda job: job.start_time or 0, reverse=True)
    return [SubmittedJob(str(job.submission_id), job.status, job.driver_exit_code, job.entrypoint) for job in submitted]


def connect_to_jobs(address: str) -> JobSubmissionClient:
    """Connect to a cluster's job server at http://HOST:8265. ValueError where none answers."""
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"--address {address}: the job server's, such as http://127.0.0.1:8265")
    try:
        _look_for_job_server(address)
        return JobSubmissionClient(address)
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error).strip().splitlines()[-1]
        raise ValueError(
            f"--address {address}: no job server of Ray's answers ({reason}); `ray dashboard cluster.yaml`, or "
            "`kubectl port-forward`, opens a tunnel to one"
        ) from None


def _look_for_job_server(address: str) -> None:
    """Ask for the version of Ray, within seconds: Ray's client waits for ever. OSError or ValueError: there is none."""
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=PATIENCE_S) as answer:
            is_ray = "ray_version" in json.load(answer)
    except urllib.error.HTTPError as error:
        is_ray = error.code in (401, 403)  # wants a token, of which Ray's client has more to say
    except ValueError:
        is_ray = False
    if not is_ray:
        raise ConnectionError("what answers there is no job server")


def _job_details(client: JobSubmissionClient, job_id: str) -> JobDetails:
    try:
        return client.get_job_info(job_id)
    except RuntimeError:
        raise ValueError(f"{job_id}: no job of that id; dml submit list names them") from None
