"""`dml submit`: commands as jobs on a Ray cluster, and what has become of them."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.arguments import Json
from pipelines.cli.endings import exit_on_error, fail, print_result
from pipelines.console import messages

if TYPE_CHECKING:
    from pipelines.cluster.submit import SubmittedJob

Address = Annotated[
    str | None, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's job server: http://HOST:8265")
]


def submit(
    arguments: Annotated[
        list[str], typer.Argument(metavar="-- train|tune|... [ARGS]... | list | logs ID | stop ID", show_default=False)
    ],
    address: Address = None,
    wait: Annotated[bool, typer.Option(help="Print the job's output, and exit with its code.")] = False,
    env: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="For the job; Ray's page shows it: no secrets.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a command on a Ray cluster: the working folder travels without data, results and secrets.

    Example: dml submit --address http://127.0.0.1:8265 --wait -- train glyphs workers=4 storage=s3://bucket/runs
    Then: dml submit list, dml submit logs ID [--wait], dml submit stop ID
    """
    with exit_on_error():
        if address is None:
            raise ValueError("--address URL is needed, or RAY_API_SERVER_ADDRESS: the job server's, http://HOST:8265")
        from pipelines.cluster.submit import connect_to_jobs, job_logs, list_jobs, read_job, stop_job, submit_job

        verb = arguments[0]
        if verb == "list":
            jobs = list_jobs(address)
            lines = (f"{job.job_id}  {job.status:<9}  {job.entrypoint}" for job in jobs)
            return print_result(as_json, [job._asdict() for job in jobs], *lines)
        if verb == "stop":
            job = stop_job(address, _only_job_id(arguments))
            messages.print(f"{job.job_id} is being stopped")
            return print_result(as_json, job._asdict())
        if verb == "logs":
            job_id = _only_job_id(arguments)
        else:
            job_id = submit_job(address, arguments, _parse_environment(env or []), messages).job_id
        if wait:
            job = _follow_until_end(address, job_id)
        else:
            if verb == "logs":
                print(job_logs(address, job_id), end="")
            job = read_job(connect_to_jobs(address), job_id)
    print_result(as_json, job._asdict())
    if wait:
        raise typer.Exit(job.code or 0)


def _only_job_id(arguments: list[str]) -> str:
    verb, *ids = arguments
    if len(ids) != 1:
        raise ValueError(f"dml submit {verb} takes one job id, not {len(ids)}; dml submit list names them")
    return ids[0]


def _parse_environment(pairs: list[str]) -> dict[str, str]:
    environment = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not (key and separator):
            raise ValueError(f"--env {key}: not KEY=VALUE")
        environment[key] = value
    return environment


def _follow_until_end(address: str, job_id: str) -> "SubmittedJob":
    """Print a job's output until it ends; Ctrl-C asks whether to stop it."""
    from pipelines.cluster.submit import follow_job, stop_job

    try:
        return follow_job(address, job_id)
    except KeyboardInterrupt:
        if sys.stdin.isatty() and typer.confirm(f"\nStop {job_id}?", default=False, err=True):
            stop_job(address, job_id)
            fail(130, f"{job_id} is being stopped")
        fail(130, f"{job_id} goes on: dml submit logs {job_id} --wait, dml submit stop {job_id}")
