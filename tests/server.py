"""MLflow, as its own command serves it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


class Server:
    """An MLflow server that a test may stop and start again."""

    def __init__(self, folder: Path, host: str = "127.0.0.1"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self.host, self.pid = host, 0

    def start(self) -> "Server":
        where = ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        where += ["--artifacts-destination", str(self.folder / "artifacts")]
        where += ["--host", self.host, "--port", str(self.port), "--workers", "1"]
        lean = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.folder / "server.log", "ab") as log:
            command = [sys.executable, "-m", "mlflow", "server", *where]
            self.pid = subprocess.Popen(command, env=lean, stdout=log, stderr=log, start_new_session=True).pid
        for _ in range(720):  # three minutes, for machines that do much else
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1)
                return self
            except OSError:
                time.sleep(0.25)
        self.stop()
        raise RuntimeError((self.folder / "server.log").read_text()[-2000:])

    def stop(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # another process's
            os.waitpid(self.pid, 0)
