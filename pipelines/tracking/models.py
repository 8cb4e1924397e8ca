"""Checkpoints as models of MLflow: log, register, fetch."""

import importlib
from pathlib import Path

from pipelines.tracking import server
from pipelines.tracking.address import without_password
from pipelines.tracking.server import import_mlflow

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
    """Fetch the checkpoint folder of a run id or models:/NAME@ALIAS from MLflow. ValueError if there is none."""
    mlflow = import_mlflow()
    mlflow.set_tracking_uri(uri)
    try:
        if run.startswith("models:/"):
            model = run
        else:
            outputs = server.connect(uri).get_run(run).outputs
            if not outputs or not outputs.model_outputs:
                raise ValueError(f"run {run} has no model: it did not finish")
            model = f"models:/{outputs.model_outputs[-1].model_id}"
        local = Path(mlflow.artifacts.download_artifacts(model))
    except mlflow.MlflowException as error:
        reason = f"not a checkpoint folder, and unknown to MLflow at {without_password(uri)}"
        raise ValueError(f"{run}: {reason} ({error.message})") from None
    return next(path.parent for path in local.rglob("manifest.json"))
