"""`dml ui`: MLflow's page."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.endings import exit_on_error, fail, print_result
from pipelines.console import messages


def ui(port: Annotated[int, typer.Option(help="On 127.0.0.1.")] = 5000) -> None:
    """Serve MLflow's page over the runs of this folder. Example: dml ui --port 5001"""
    with exit_on_error():
        from pipelines.tracking.address import default_uri, without_password
        from pipelines.tracking.server import prepare_store

        uri = default_uri(Path.cwd())
        if uri.startswith("http"):
            return print_result(False, None, f"the runs are on the server {without_password(uri)}")
        prepare_store(uri)
    messages.print(f"MLflow on http://127.0.0.1:{port}  (Ctrl-C ends it)")
    command = ["server", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with exit_on_error():
        code = subprocess.run([sys.executable, "-m", "mlflow", *command]).returncode
        if code:
            fail(1, f"failed: MLflow's server ended with {code}; is port {port} taken? --port chooses another")
