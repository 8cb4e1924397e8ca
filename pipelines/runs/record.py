"""A run's record in MLflow: params, tags, data set, model."""

import hashlib
import json
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dml_core.data.datasets import Splits
from pipelines.config.identity import FREE_KEYS
from pipelines.config.recipe import to_yaml
from pipelines.config.schema import Config
from pipelines.runs.outcome import SweepMember
from pipelines.tracking.runs import log_text, start_run


def record_run(uri: str, config: Config, params: dict[str, Any], tags: dict[str, str], splits: Splits) -> str:
    """A run of MLflow's for a config, its data set and tags included. Returns its id."""
    assert config.name
    tags = {
        "method": "+".join(config.method) or "none",
        "base_loss": config.loss.name,
        "backbone": config.backbone.name,
        "data": config.data.name,
        "seed": str(config.seed),
        "git_commit": _git_commit(),
        **tags,
    }
    source = config.data.table or config.data.root or "embedded"
    whole = splits.train.whole or splits.train
    run_id = start_run(uri, config.data.name, config.name, params, tags, whole.digest(), source)
    log_text(uri, run_id, to_yaml(config), "config.yaml")
    return run_id


def record_training(uri: str, config: Config, splits: Splits, unreadable: list[str], part: SweepMember | None) -> str:
    flat, tags = config.flat(), {"workers": str(config.workers)}
    if part:
        tags |= part.tags | {"mlflow.parentRunId": part.parent}
    if part is None or part.test:  # a trial has nothing that `dml compare` could compare
        group = {k: v for k, v in flat.items() if k not in (*FREE_KEYS, "seed")}
        tags["group"] = hashlib.sha256(json.dumps(group, sort_keys=True, default=str).encode()).hexdigest()[:12]
    run_id = record_run(uri, config, flat, tags, splits)
    if unreadable:
        log_text(uri, run_id, "\n".join(unreadable), "left_out.txt")
    return run_id


def package_version() -> str:
    try:
        return version("dml-ray")
    except PackageNotFoundError:
        return "0"


def _git_commit() -> str:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
