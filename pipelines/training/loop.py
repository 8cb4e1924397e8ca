"""The training loop of one worker, as a story. Read after dml_core/learner.py.

What each sentence does stands in setup.py (the training and its parts), epoch.py (the steps of one epoch),
evaluation.py (validation and test) and history.py (what is remembered and told).
"""

from pipelines.training.epoch import train_epoch
from pipelines.training.job import TrainingJob, TrainingResult
from pipelines.training.setup import begin


def train_loop(job: TrainingJob) -> TrainingResult:
    """Train, validate, and test once at the end; the same on every rank.

    Raises:
        ArithmeticError: The loss is no longer finite.
    """
    training = begin(job)  # sets, learner, plan, optimizer
    training.resume()  # from the newest whole checkpoint, or from the start
    for epoch, batches in training.epochs():
        training.change_settings(epoch)
        training.estimate_variation(epoch)  # IAA, when due
        metrics = train_epoch(training, epoch, batches)
        if training.validates_after(epoch):
            metrics |= training.validate(epoch)
        training.remember(epoch, metrics)
        if training.validates_after(epoch):
            training.keep(epoch, metrics)
        training.tell(epoch, metrics)  # Ray Train or Tune, and the driver, which tells MLflow
    return training.test_best()
