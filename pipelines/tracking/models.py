"""Checkpoints as models of MLflow: log, register, fetch."""

import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.tracking import server
from pipelines.tracking.address import without_password
from pipelines.tracking.moved_files import is_there, local_folder
from pipelines.tracking.refusals import refused_in_one_line
from pipelines.tracking.server import import_mlflow

if TYPE_CHECKING:
    import mlflow

LOADER = "pipelines.embedder"  # the module by which MLflow loads our models


def set_alias(uri: str, model: str, alias: str) -> None:
    """Point an alias at a registered model, NAME/VERSION."""
    name, _, version = model.rpartition("/")
    server.connect(uri).set_registered_model_alias(name, alias, version)


def import_for_log_model() -> None:
    """Import what log_model will: MLflow loads the model to try its example."""
    importlib.import_module(LOADER)


def log_model(
    uri: str, run_id: str, checkpoint: Path, model_name: str, example: bytes, outputs: list[str], version: str
) -> str:
    """Log a checkpoint as a pyfunc model, from encoded pictures to embeddings, and register it.

    The model is the folder itself, which pipelines.embedder reads: nothing is pickled.

    Args:
        uri: MLflow's store.
        run_id: The run that made the checkpoint.
        checkpoint: Its folder.
        model_name: Of the registered model, to which a version is added.
        example: An encoded picture, the input example.
        outputs: The columns of its answer, each a list of numbers: "vector" and, with NAMR, "structure".
        version: Of this package, which the model requires.

    Returns:
        NAME/VERSION.
    """
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    mlflow = import_mlflow()
    mlflow.set_tracking_uri(uri)
    answer = Schema([ColSpec(Array(DataType.float), name) for name in outputs])
    signature = ModelSignature(Schema([ColSpec("binary", "image")]), answer)
    mlflow.start_run(run_id=run_id)
    try:
        info = mlflow.pyfunc.log_model(
            name="model",
            loader_module=LOADER,
            data_path=str(checkpoint),
            signature=signature,
            input_example=pd.DataFrame({"image": [example]}),
            pip_requirements=[f"dml-ray=={version}"],
            registered_model_name=model_name,
        )
    finally:
        mlflow.end_run("FINISHED")  # whatever becomes of the model: the training has ended well
    return f"{model_name}/{info.registered_model_version}"


def fetch_checkpoint(uri: str, run: str) -> Path:
    """Fetch the checkpoint folder of a run id or a registered model from MLflow; one on this machine is used in place.

    Args:
        uri: MLflow's store.
        run: A run id, models:/NAME/VERSION or models:/NAME@ALIAS.

    Raises:
        ValueError: There is none, or its files are gone.
    """
    mlflow = import_mlflow()
    mlflow.set_tracking_uri(uri)
    client = server.connect(uri)
    with refused_in_one_line(uri):
        if run.startswith("models:/"):
            location = _location_of_registered(client, uri, run)
        else:
            location = client.get_logged_model(_model_of_run(client, uri, run)).artifact_location
        if not is_there(location):
            raise ValueError(
                f"{run}: its files are no longer at {local_folder(location)}; put them back, or name a checkpoint "
                "folder, runs/NAME/epoch_..."
            )
        local = Path(mlflow.artifacts.download_artifacts(location))
    for manifest in local.rglob("manifest.json"):
        return manifest.parent
    raise ValueError(f"{run}: not a model of dml train; {location} has no manifest.json")


def _model_of_run(client: "mlflow.MlflowClient", uri: str, run_id: str) -> str:
    """Return the id of the model that a run has made."""
    try:
        run = client.get_run(run_id)
    except import_mlflow().MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise ValueError(
            f"{run_id}: not a checkpoint folder, and unknown to MLflow at {without_password(uri)}; `dml ui` shows "
            "the runs that it has"
        ) from None
    if run.outputs and run.outputs.model_outputs:
        return str(run.outputs.model_outputs[-1].model_id)
    if kind := run.data.tags.get("kind"):
        raise ValueError(
            f"run {run_id} is a {kind}, which has no model of its own; dml ui shows the runs of its models"
        )
    raise ValueError(
        f"run {run_id} has no model: it did not finish; continue it, or name one of its checkpoint folders, "
        "runs/NAME/epoch_..."
    )


def _location_of_registered(client: "mlflow.MlflowClient", uri: str, model: str) -> str:
    """Return where the files of models:/NAME/VERSION, models:/NAME@ALIAS or models:/m-ID are."""
    if logged := re.fullmatch(r"models:/+(m-[0-9a-f]{32})", model):
        return str(client.get_logged_model(logged[1]).artifact_location)
    named = re.fullmatch(r"models:/+([^/@]+)(?:/(\d+|latest)|@([^/@]+))", model)
    if not named:
        raise ValueError(f"{model}: not models:/NAME/VERSION or models:/NAME@ALIAS")
    name, version, alias = named.groups()
    try:
        registered = client.get_registered_model(name)
    except import_mlflow().MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = ", ".join(other.name for other in client.search_registered_models()) or "none"
        raise ValueError(
            f"{model}: unknown to MLflow at {without_password(uri)}; its registered models: {names}"
        ) from None
    versions = sorted(int(entry.version) for entry in client.search_model_versions(f"name = '{name}'"))
    if version == "latest" and versions:
        version = str(versions[-1])
    version = version or str(registered.aliases.get(alias, ""))
    if not version.isdecimal() or int(version) not in versions:
        allowed = [f"models:/{name}/{number}" for number in versions]
        allowed += [f"models:/{name}@{other}" for other in registered.aliases]
        raise ValueError(
            f"{model}: unknown to MLflow at {without_password(uri)}; of {name} it has {', '.join(allowed) or 'none'}"
        )
    return str(client.get_model_version_download_uri(name, version))
