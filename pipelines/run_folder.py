"""What a run, or a sweep, leaves in `storage`, here or in a bucket, beside what MLflow keeps."""

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

import pyarrow.fs

from pipelines import checkpoint
from pipelines.config import Config


class RunFolder:
    """storage/NAME: run.json (id and config), checkpoints, result.json at the end, logs/ where it is local."""

    def __init__(self, config: Config):
        try:
            self.filesystem, self.path = checkpoint.run_folder(config)
            self.filesystem.create_dir(str(Path(self.path).parent), recursive=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"storage={config.storage}: cannot be written to ({error})") from None
        self.logs = Path(self.path) / "logs" if isinstance(self.filesystem, pyarrow.fs.LocalFileSystem) else None

    def read(self, name: str) -> dict[str, Any] | None:
        try:
            with self.filesystem.open_input_stream(f"{self.path}/{name}") as file:
                return json.loads(file.read())
        except FileNotFoundError:
            return None

    def forget(self, kept: Container[str]) -> None:
        """Of a sweep: checkpoints of all its runs but the `kept`; what came of them stays."""
        for found in self.filesystem.get_file_info(pyarrow.fs.FileSelector(self.path, recursive=True)):
            run, name = Path(found.path).parts[-2:]
            if name.startswith(("epoch_", "checkpoint_")) and run not in kept and not found.is_file:
                self.filesystem.delete_dir(found.path)

    def write(self, name: str, content: dict[str, Any] | str) -> None:
        """A text, or JSON."""
        text = content if isinstance(content, str) else json.dumps(content, indent=1)
        self.filesystem.create_dir(self.path, recursive=True)
        with self.filesystem.open_output_stream(f"{self.path}/{name}.partial") as file:
            file.write(text.encode())
        self.filesystem.move(f"{self.path}/{name}.partial", f"{self.path}/{name}")
