"""Features of a frozen backbone, computed once and by all CPUs, before trials share them."""

from dataclasses import dataclass
from typing import ClassVar

from pipelines.cluster.progress import Reporter
from pipelines.cluster.worker import Job, device_of_worker
from pipelines.data.sets import identify, load_splits
from pipelines.data.sources import Sources
from pipelines.models.build import build_learner
from pipelines.models.start import kept_start, take_over


@dataclass(frozen=True)
class FeaturesJob(Job):
    """A set whose features are to be computed."""

    loop: ClassVar[str] = "pipelines.sweeps.features:compute_features"


def compute_features(job: FeaturesJob) -> None:
    """Compute the features of the whole set, if this node does not have them, and keep them on its disk."""
    config = job.config
    splits, device = load_splits(config, job.unreadable), device_of_worker(config)
    names = splits.train.class_names
    with kept_start(config) as start:
        learner = build_learner(config, len(names), read_weights=start is None).to(device)
        if config.precision == "float64":
            learner.double()
        if start is not None:
            take_over(learner, start, config, names)
    data = job.data or identify(config.data)
    Sources(config, learner, device, job.worker.cpus, Reporter(None), data).of(splits.train)
