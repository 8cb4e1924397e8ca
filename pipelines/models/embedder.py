"""A checkpoint folder as an embedding model: pictures in, unit vectors out. Also MLflow's way to load it."""

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dml_core.data import transforms
from dml_core.data.pictures import BadPicture, decode
from dml_core.learner import Learner
from pipelines.models.build import build_embedder
from pipelines.models.checkpoint import is_whole, read_config

if TYPE_CHECKING:
    import pandas


def embed_views(learner: Learner, x: Tensor) -> dict[str, Tensor]:
    """Embed views (b, 3, S, S) or features (b, F).

    Returns:
        float32 "vector" (b, D) of unit length and, with NAMR, "structure" (b, D).
    """
    features = learner.features(x)
    outputs = {"vector": torch.nn.functional.normalize(learner.embed(features), dim=1).float()}
    if learner.namr is not None:
        outputs["structure"] = learner.structure(features).float()
    return outputs


class Embedder:
    """A model that turns encoded pictures into unit vectors: a checkpoint on one device, without Ray."""

    def __init__(self, folder: str | Path):
        """Load a checkpoint folder. ValueError where it is not a whole one."""
        folder = Path(folder)
        if not is_whole(folder):
            raise ValueError(f"{folder}: not a whole checkpoint folder")
        self.config = read_config(folder)
        self.learner = build_embedder(self.config, folder)
        self.view = transforms.evaluation_view(self.config.data.image_size)

    @torch.inference_mode()
    def vectors(self, pictures: list[bytes]) -> dict[str, Tensor]:
        """Embed N encoded pictures (JPEG, PNG, ...): "vector" (N, D) and, with NAMR, "structure" (N, D).

        Raises:
            BadPicture: One cannot be decoded.
        """
        transform, side = self.view
        named = ((f"number {number} of the input", picture) for number, picture in enumerate(pictures, 1))
        views = torch.stack([transform(decode(picture, side, name)) for name, picture in named])
        return embed_views(self.learner, views)

    def predict(self, inputs: Any, params: dict[str, Any] | None = None) -> "pandas.DataFrame":
        """Embed the column `image` of a DataFrame, encoded pictures, in one pass: MLflow's way to call a model.

        Returns:
            A row a picture: the columns "vector" and, with NAMR, "structure" have an array (D,) float32 each.

        Raises:
            MlflowException: A picture cannot be decoded; MLflow's server answers with status 400.
        """
        import pandas as pd

        try:
            pictures = [_plain(number, content) for number, content in enumerate(inputs["image"], 1)]
            if not pictures:
                raise ValueError("the input has no rows: column `image` needs a picture")
            outputs = self.vectors(pictures)
        except ValueError as error:
            from pipelines.tracking.server import bad_request

            raise bad_request(str(error)) from None
        return pd.DataFrame({name: list(rows.numpy()) for name, rows in outputs.items()})


def _plain(number: int, content: Any) -> bytes:
    """Decode base64, in which MLflow's server leaves `inputs` and `instances`. No picture's own bytes are base64."""
    if not isinstance(content, bytes | str):
        raise BadPicture([(f"number {number} of the input", f"{type(content).__name__}, not bytes or base64")])
    try:
        return base64.b64decode(content, validate=True)
    except ValueError:
        return content.encode() if isinstance(content, str) else content


def _load_pyfunc(path: str) -> Embedder:
    return Embedder(Path(path))
