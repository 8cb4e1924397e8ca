"""What tells two runs apart: the keys that results depend on, absolute paths, and the check of a continued run."""

from datetime import datetime
from pathlib import Path
from typing import Any

from pipelines.config import schema
from pipelines.config.schema import Config

# What results do not depend on: it may differ when a run is continued, and sets no two runs apart.
FREE_KEYS = (
    *("workers", "use_gpu", "name", "storage", "max_failures", "timeout", "wait_for_nodes", "checkpoint_every"),
    "model_name",
    *("data.root", "data.loader", "data.loader_processes", "data.download", "data.links"),
)


def with_absolute_paths(config: Config) -> Config:
    """A name for the run, and paths that mean the same in a worker's working folder."""
    name = config.name
    if name is None:
        parts = [config.data.name, *config.method, config.loss.name, f"s{config.seed}"]
        name = "-".join([*parts, datetime.now().strftime("%Y%m%d-%H%M%S")])
    storage = config.storage if "://" in config.storage else str(Path(config.storage).expanduser().resolve())
    places = {"root": config.data.root, "table": config.data.table}
    local = {k: str(Path(v).expanduser().resolve()) for k, v in places.items() if v and "://" not in v}
    data = config.data.model_copy(update=local)
    return config.model_copy(update={"name": name, "storage": storage, "data": data})


def require_same(config: Config, earlier: dict[str, Any], path: str) -> None:
    old, new = schema.flatten(earlier), config.flat()
    different = [k for k in sorted({*old, *new}) if k not in FREE_KEYS and old.get(k) != new.get(k)]
    if different:
        changes = ", ".join(f"{k}={new.get(k)} (was {old.get(k)})" for k in different[:4])
        raise ValueError(f"name={config.name} was begun with another config in {path}: {changes}; choose another name")
