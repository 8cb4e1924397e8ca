"""`dml submit`: commands as jobs on a Ray cluster, and what has become of them."""

import json
import sys
from typing import Annotated

import typer

from pipelines.cli import endings
from pipelines.cli.arguments import Json
from pipelines.cli.endings import exit_on_error
from pipelines.console import messages

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
        from pipelines.cluster.submit import (
            connect_to_jobs,
            job_logs,
            list_jobs,
            stop_job,
            submit_job,
            wait_for_end,
        )

        verb, rest = arguments[0], arguments[1:]
        if verb == "list":
            found = list_jobs(address)
            if as_json:
                print(json.dumps([job._asdict() for job in found]))
            else:
                for job in found:
                    print(f"{job.job_id}  {job.status:<9}  {job.entrypoint}")
            return
        if verb in ("logs", "stop"):
            if len(rest) != 1:
                raise ValueError(f"dml submit {verb} takes one job id, not {len(rest)}; dml submit list names them")
            job_id = rest[0]
        else:
            given = [pair.partition("=") for pair in env or []]
            if wrong := [key for key, separator, _ in given if not (key and separator)]:
                raise ValueError(f"--env {wrong[0]}: not KEY=VALUE")
            job_id = submit_job(address, arguments, {key: value for key, _, value in given}, messages).job_id
        if verb == "stop":
            job = stop_job(address, job_id)
            messages.print(f"{job_id} is being stopped")
        elif wait:
            job = _followed(address, job_id)
        else:
            if verb == "logs":
                print(job_logs(address, job_id), end="")
            job = wait_for_end(connect_to_jobs(address), job_id)
    if as_json:
        print(json.dumps(job._asdict()))
    if wait and verb != "stop":
        raise typer.Exit(job.code or 0)


def _followed(address: str, job_id: str):  # type: ignore[no-untyped-def]
    """Its output until it ends; Ctrl-C asks whether to stop it."""
    from pipelines.cluster.submit import follow_job, stop_job

    try:
        return follow_job(address, job_id)
    except KeyboardInterrupt:
        if sys.stdin.isatty() and typer.confirm(f"\nStop {job_id}?", default=False, err=True):
            stop_job(address, job_id)
            endings.fail(130, f"{job_id} is being stopped")
        endings.fail(130, f"{job_id} goes on: dml submit logs {job_id} --wait, dml submit stop {job_id}")
