"""A checkpoint folder as an embedding model: pictures in, unit vectors out. Also MLflow's way to load it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dml_core.data import transforms
from dml_core.data.pictures import decode
from pipelines import build, checkpoint


class Embedder:
    """predict(pictures) -> (N, D) float32 unit vectors. Loaded from a checkpoint; one device, no Ray."""

    def __init__(self, folder: Path):
        if not checkpoint.whole(folder):
            raise ValueError(f"{folder}: not a whole checkpoint folder")
        self.config = checkpoint.read_config(folder)
        classes = len(checkpoint.read_class_names(folder))
        self.learner = build.learner(self.config, classes, read_weights=False).eval()
        checkpoint.load_weights(folder, self.learner)
        self.view = transforms.evaluation(self.config.data.image_size)

    @torch.inference_mode()
    def embed(self, pictures: list[bytes]) -> Tensor:
        """Encoded pictures (JPEG, PNG, ...) to (N, D) unit vectors."""
        view = self.view
        views = torch.stack([view.transform(decode(picture, view.side, "the input")) for picture in pictures])
        return torch.nn.functional.normalize(self.learner.embed(views), dim=1)

    def predict(self, inputs: Any, params: dict[str, Any] | None = None) -> np.ndarray:
        """inputs: a DataFrame with a column `image` of encoded pictures (bytes)."""
        return self.embed(list(inputs["image"])).numpy()


def _load_pyfunc(path: str) -> Embedder:
    return Embedder(Path(path))
