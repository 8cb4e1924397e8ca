"""Where batches come from: decoded pictures or, with a frozen backbone, its cached features."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dml_core.data import transforms
from dml_core.data.datasets import LabelledImages
from dml_core.data.loading import Views
from dml_core.learner import Learner
from pipelines.cluster.progress import Reporter
from pipelines.config.schema import Config
from pipelines.data import features
from pipelines.data.features import Features
from pipelines.data.sets import cache_folder
from pipelines.data.streaming import StreamedViews


def views_of(config: Config, images: LabelledImages) -> Views:
    size, augment = config.data.image_size, config.data.augment
    return Views(images, transforms.evaluation(size), transforms.training(augment, size))


Source = Views | StreamedViews | Features


class Sources:
    """Where batches of a set come from: decoded pictures or, with a frozen backbone, its cached features."""

    def __init__(self, config: Config, learner: Learner, device: torch.device, cpus: float, progress: Reporter):
        self.config, self.learner, self.device, self.progress = config, learner, device, progress
        # Who writes to its node's disk. Ray Train itself would say so to its own workers, not in a trial of Ray Tune.
        self.writes = int(os.environ.get("LOCAL_RANK", 0)) == 0
        spare = max(0, int(cpus) - 1) if config.data.name != "glyphs" else 0
        asked = config.data.loader_processes
        self.processes = min(8, spare) if asked is None else asked
        self.files: dict[int, Path] = {}  # features of a whole set, whose parts are asked for
        self.cpus = max(1, int(cpus))
        self.threads = ThreadPoolExecutor(self.cpus) if self.cpus > 1 and device.type == "cpu" else None

    def each(self, function: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[Any]:
        """map in the run's precision, on as many CPUs as this worker has."""
        amp = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")
        return (self.threads.map if self.threads else map)(amp(function), *arguments)

    def of(self, images: LabelledImages) -> Source:
        if not self.config.backbone.frozen:
            return self.views(images)
        whole = images.whole or images
        if id(whole) not in self.files:
            views = self.views(whole)

            def note(done: int, of: int) -> None:
                self.progress.note("features", done, of)

            torch.set_num_threads(self.cpus)
            self.files[id(whole)] = features.cached(
                self.config, self.learner, views, cache_folder(), self.device, self.writes, self.processes, note
            )
            torch.set_num_threads(1)
        return Features(self.files[id(whole)], images.places)

    def views(self, images: LabelledImages) -> Views | StreamedViews:
        views = views_of(self.config, images)
        return StreamedViews(views) if self.config.data.loader == "ray" and images.files else views
