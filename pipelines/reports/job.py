"""What the loop that inspects a trained model is given."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from pipelines.training.job import ModelJob


@dataclass(frozen=True)
class InspectJob(ModelJob):
    """A trained model to look at.

    Attributes:
        metrics: Of its tests, as MLflow knows them; None: they are measured.
        epoch: That the model was trained to, from 0: synthesis depends on it.
    """

    loop: ClassVar[str] = "pipelines.reports.inspection:inspect_loop"
    metrics: Mapping[str, float] | None = None
    epoch: int = 0
