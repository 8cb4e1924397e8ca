"""A run's record in MLflow: params, tags, data set, model."""

import io
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from dml_core.data.datasets import SetIdentity, Splits
from dml_core.data.pictures import to_image
from pipelines.config.identity import group_of
from pipelines.config.recipe import parse_config, to_yaml
from pipelines.config.schema import Config
from pipelines.models.run_folder import RunFolder, local_copy
from pipelines.models.start import OpenStart
from pipelines.runs.outcome import SweepMember
from pipelines.tracking.address import experiment_of_environment
from pipelines.tracking.models import log_model
from pipelines.tracking.runs import start_run


def with_experiment(config: Config, begun: Mapping[str, Any] | None) -> Config:
    """Return a config with a definite experiment: that of the key, of MLFLOW_EXPERIMENT_NAME, or by the set's name.

    Args:
        config: Of the run.
        begun: The nested config that the run was begun with, in whose experiment it stays; None: it begins now.

    Raises:
        ValueError: It was begun in another; or MLflow's variables say something else, see experiment_of_environment.
    """
    key, asked = "experiment", config.experiment
    if asked is None:
        key, asked = "MLFLOW_EXPERIMENT_NAME", experiment_of_environment()
        try:
            parse_config({"experiment": asked})
        except ValueError as error:
            raise ValueError(str(error).replace("experiment", key, 1)) from None
    kept = begun and begun.get("experiment", begun["data"]["name"])
    if asked and kept and asked != kept:
        raise ValueError(
            f"{key}={asked}: name={config.name} was begun in experiment={kept}, and stays there; leave {key} out, or "
            "choose another name"
        )
    return config.model_copy(update={"experiment": kept or asked or config.data.name})


class Lineage(NamedTuple):
    """What a run begins with.

    Attributes:
        opened: The start.
        seen_classes: How many of the test classes it was trained on, as of check_start.
    """

    opened: OpenStart
    seen_classes: str = ""

    @property
    def params(self) -> dict[str, str]:
        """The param that names the start: which checkpoint it is, by whatever name the user has called it."""
        return {self.opened.key: self.opened.start.label}

    @property
    def tags(self) -> dict[str, str]:
        """The earlier run (its id, or its name where that is not known), and the checkpoint's fingerprint."""
        start = self.opened.start
        tags = {"start_from": start.run_id or start.name, "start_fingerprint": start.fingerprint}
        return tags | ({"start_saw": self.seen_classes} if self.seen_classes else {})


def record_run(
    tracker: Executor,
    uri: str,
    config: Config,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    data: SetIdentity,
    texts: Mapping[str, str] = MappingProxyType({}),
    key: str = "",
) -> str:
    """Start a run in MLflow, with its data set as an input and its config as an artifact.

    Args:
        tracker: Calls what speaks to MLflow, see tracking.process.
        uri: MLflow's store.
        config: Of the run.
        params: To log, by name.
        tags: Besides those that every run has: method, base loss, backbone, data, seed, git commit.
        data: What the run's set is.
        texts: Artifacts besides the config, by file name.
        key: By which a start that was cut off is found again, see start_run.

    Returns:
        The run's id.
    """
    assert config.name and config.experiment
    all_tags = {
        "method": "+".join(config.method) or "none",
        "base_loss": config.loss.name,
        "backbone": config.backbone.name,
        "data": config.data.name,
        "data_digest": data.digest,
        "seed": str(config.seed),
        "git_commit": _git_commit(),
        **tags,
    }
    named = config.data.name, data.digest, config.data.table or config.data.root or "embedded"
    files = {"config.yaml": to_yaml(config), **texts}
    started = tracker.submit(start_run, uri, config.experiment, config.name, params, all_tags, *named, files, key)
    return started.result()


def record_training(
    tracker: Executor,
    uri: str,
    config: Config,
    data: SetIdentity,
    unreadable: Sequence[str],
    lineage: Lineage | None,
    member: SweepMember | None,
    key: str,
) -> str:
    """Start a training's run in MLflow, and return its id; runs that differ by their seed alone share the tag `group`.

    A start that was cut off is completed: the key is that of before.
    """
    params, tags = config.flat(), {"workers": str(config.workers)}
    if lineage:
        params, tags = params | lineage.params, tags | lineage.tags
    if member:
        tags |= member.tags | {"mlflow.parentRunId": member.parent}
    if member is None or member.test:  # a trial has nothing that `dml compare` could compare
        tags["group"] = group_of(params, data.digest)
    texts = {"left_out.txt": "\n".join(unreadable)} if unreadable else {}
    return record_run(tracker, uri, config, params, tags, data, texts, key)


def register_model(
    tracker: Executor, uri: str, run_id: str, config: Config, folder: RunFolder, checkpoint: str, splits: Splits
) -> str:
    """Log a checkpoint of a run's folder as a model of MLflow, with a test picture as its example.

    Returns:
        The registered model as NAME/VERSION.
    """
    example = io.BytesIO()
    picture = splits.tests["test"].query.picture(0, config.data.image_size)
    to_image(picture).save(example, "PNG")
    name = config.model_name or f"dml-{config.data.name}"
    with local_copy(folder.filesystem, f"{folder.path}/{checkpoint}") as local:
        outputs = ["vector", "structure"] if "namr" in config.method else ["vector"]
        model = uri, run_id, local, name, example.getvalue(), outputs, package_version()
        return tracker.submit(log_model, *model).result()


def package_version() -> str:
    """Return the installed version of this package; "0" where it is used without being installed."""
    try:
        return version("dml-ray")
    except PackageNotFoundError:
        return "0"


@cache
def _git_commit() -> str:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
