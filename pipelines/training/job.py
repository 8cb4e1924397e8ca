"""What the loops of training and evaluation are given. Imports no networks: the driver makes these."""

from dataclasses import dataclass, field
from typing import ClassVar

from pipelines.cluster.transfer import SentFiles
from pipelines.cluster.worker import Job


@dataclass(frozen=True)
class TrainingJob(Job):
    """A run to train, from its start or from its newest checkpoint.

    Attributes:
        started: When the command began, in seconds since 1970; None: nobody asks.
        test: Whether the best epoch is tested at the end; a sweep chooses by validation classes alone.
    """

    loop: ClassVar[str] = "pipelines.training.loop:train_loop"
    started: float | None = None
    test: bool = True


@dataclass(frozen=True)
class ModelJob(Job):
    """A loop over a trained model.

    Attributes:
        model: The files of its checkpoint that embedding takes (models.checkpoint.MODEL_FILES).
    """

    loop: ClassVar[str] = "pipelines.training.evaluation:evaluate_loop"
    model: SentFiles = field(default_factory=SentFiles)
