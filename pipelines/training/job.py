"""What the loops of training and evaluation are given, and what training returns. Imports no networks."""

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from pipelines.cluster.transfer import SentFiles
from pipelines.cluster.worker import Job
from pipelines.phases import Phase
from pipelines.tracking.records import EpochRecord


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


class TrainingResult(NamedTuple):
    """What the training loop returns.

    Attributes:
        metrics: Of the last epoch, of the best one, and of the test.
        records: Of every epoch and of the end. The driver has had most of them by then, and knows what is new.
        phases: Where rank 0's seconds went.
    """

    metrics: dict[str, float]
    records: list[EpochRecord]
    phases: list[Phase]


@dataclass(frozen=True)
class ModelJob(Job):
    """A loop over a trained model.

    Attributes:
        model: The files of its checkpoint that embedding takes (models.checkpoint.MODEL_FILES).
    """

    model: SentFiles = field(default_factory=SentFiles)


@dataclass(frozen=True)
class EvaluationJob(ModelJob):
    """A trained model to test.

    Attributes:
        every: See data.sets.load_tests.
        out: Address of the file beside which each worker writes its queries; None: nowhere.
    """

    loop: ClassVar[str] = "pipelines.training.evaluation:evaluate_loop"
    every: bool = False
    out: str | None = None


class Evaluated(NamedTuple):
    """What the evaluation loop returns: test*/* metrics, and how many workers there were."""

    metrics: dict[str, float]
    workers: int
