"""The quickstart, line after line, as a reader types it."""

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli import main

ROOT = Path(__file__).parents[2]


def test_every_line_of_the_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_ray: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    text = (ROOT / "docs" / "quickstart.md").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("dml ")]
    outputs = {}
    for line in lines:
        result = CliRunner().invoke(main.app, shlex.split(line)[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"
        outputs[line] = result.output
    assert len(outputs) == 5
    assert "first is finished; this is its outcome" in outputs[lines[0]]
    assert "nearest to docs/query.png" in outputs[lines[-1]] and "U+" in outputs[lines[-1]]
