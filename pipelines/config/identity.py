"""What makes two runs the same: the keys and pictures that results depend on, and the check of a continued run."""

import hashlib
import json
from collections.abc import Collection, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from dml_core.data.datasets import SetIdentity
from pipelines.config.recipe import parse_stored_config
from pipelines.config.schema import AUTO, Config
from pipelines.config.sections import Data

# Keys that a training does not depend on: they may differ when a run is continued, and within a group of seeds. Where
# the pictures lie is free, as they are known by themselves (SetIdentity).
FREE_KEYS = (
    *("workers", "use_gpu", "gpus_per_worker", "name", "storage", "max_failures", "timeout", "wait_for_nodes"),
    *("checkpoint_every", "experiment", "model_name", "metrics"),
    *("data.root", "data.table", "data.loader", "data.loader_processes", "data.download", "data.links"),
)
# Of these and the keys of how pictures are found and computed with, those that may differ when a report looks at a
# trained model; which run it is, and what was measured of it, is that of the run.
REPORT_KEYS = {*FREE_KEYS, "precision", *("data.on_bad_image", "data.decode")}
REPORT_KEYS -= {"name", "storage", "experiment", "metrics"}


def group_of(params: Mapping[str, Any], digest: str) -> str:
    """Return the same 12 hex digits for runs that differ by their seed alone. digest: of their set."""
    group = {key: value for key, value in params.items() if key not in (*FREE_KEYS, "seed")}
    group["data_digest"] = digest
    return hashlib.sha256(json.dumps(group, sort_keys=True, default=str).encode()).hexdigest()[:12]


def with_absolute_paths(config: Config) -> Config:
    """Return a config with a name for its run, and with paths that mean the same in a worker's working folder."""
    name = config.name
    if name is None:
        parts = [config.data.name, *config.method, config.loss.name, f"s{config.seed}"]
        name = "-".join([*parts, datetime.now().strftime("%Y%m%d-%H%M%S")])
    storage = config.storage if "://" in config.storage else str(Path(config.storage).expanduser().resolve())
    values: dict[str, Any] = {"name": name, "storage": storage, "data": with_absolute_places(config.data)}
    if config.start_from is not None:
        values["start_from"] = _absolute_if_there(config.start_from)
    weights = _absolute_if_there(config.backbone.weights)
    values["backbone"] = config.backbone.model_copy(update={"weights": weights})
    return config.model_copy(update=values)


def with_absolute_places(data: Data) -> Data:
    """Return a config's section data with the absolute paths of its root and table."""
    places = {"root": data.root, "table": data.table}
    local = {k: str(Path(v).expanduser().resolve()) for k, v in places.items() if v and "://" not in v}
    return data.model_copy(update=local)


def _absolute_if_there(text: str) -> str:
    """Return the absolute path of a file or a folder that a text names; any other text as it is: a run id, a URL."""
    path = Path(text).expanduser()
    return str(path.resolve()) if text not in ("imagenet", "none") and path.exists() else text


def with_slices(config: Config, earlier: Mapping[str, Any] | None) -> Config:
    """Return a config with a definite batch.slices: its own, that of the run that it continues, or the default.

    Args:
        config: Of the run.
        earlier: The nested config that the run was begun with; None: it begins now. The default then follows from the
            number of workers, and stays open as long as that is `auto`.

    Raises:
        ValueError: There are more workers than slices.
    """
    slices = config.batch.slices or (parse_stored_config(dict(earlier)) if earlier else config).slices
    if config.workers == AUTO and not (config.batch.slices or earlier):
        return config
    config = config.model_copy(update={"batch": config.batch.model_copy(update={"slices": slices})})
    config.require_slices()
    return config


def require_same(config: Config, earlier: Mapping[str, Any], path: str, may_differ: Collection[str] = ()) -> None:
    """Refuse to continue a run with a config that its results would depend on.

    Args:
        config: Of the run that is to go on.
        earlier: The nested config that the run was begun with.
        path: The run's folder, for the message.
        may_differ: Keys besides FREE_KEYS that may be others now, because somebody asked for it.

    Raises:
        ValueError: Keys other than FREE_KEYS differ.
    """
    begun = with_slices(parse_stored_config(dict(earlier)), earlier)  # earlier versions did not store a default
    old, new = begun.flat(), parse_stored_config(with_slices(config, earlier).to_dict()).flat()
    different = [k for k in sorted({*old, *new}) if k not in (*FREE_KEYS, *may_differ) and old.get(k) != new.get(k)]
    if different:
        changes = ", ".join(f"{k}={new.get(k)} (was {old.get(k)})" for k in different[:4])
        remedy = "; choose another name"
        if different == ["gradients"]:
            remedy += ", or go on with --switch-gradients: checkpoints are the same, results are not"
        raise ValueError(f"name={config.name} was begun with another config in {path}: {changes}{remedy}")


def require_same_pictures(name: str, data: SetIdentity, earlier: SetIdentity, path: str) -> None:
    """Refuse to continue a run or a sweep over other pictures than it was begun with.

    Args:
        name: How it is named on the command line, such as name=x.
        data: What the set is now.
        earlier: What it was.
        path: The folder of the run or sweep, for the message.

    Raises:
        ValueError: They differ.
    """
    if data.digest != earlier.digest:
        raise ValueError(
            f"{name} was begun on other pictures in {path}: the set was {earlier} then and is {data} now; "
            f"{describe_change(data, earlier)}"
        )


def describe_change(data: SetIdentity, earlier: SetIdentity) -> str:
    """Say in a line what has changed in a set, and the way on. data, earlier: different ones."""
    if data.listing != earlier.listing:
        return "files were added, removed, renamed or labelled anew: choose another name, or put them back"
    if data.pictures != earlier.pictures:
        return (
            "names and labels are the same, but not the files' sizes or times: choose another name or, if they were "
            "only copied, copy them with their times (cp -a, rsync -a)"
        )
    return "the pictures are the same, but not what is tested or validated on, or roles or cameras: choose another name"
