"""Where batches come from: decoded pictures or, with a frozen backbone, its cached features."""

import os
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from dml_core.data.datasets import LabelledImages, SetIdentity
from dml_core.data.jpegs import JpegViews
from dml_core.data.loading import Views, sent_ahead
from dml_core.data.sampling import Rows
from dml_core.learner import Learner
from pipelines.cluster.progress import Reporter
from pipelines.cluster.threads import torch_threads
from pipelines.config.schema import Config
from pipelines.data.features import Features, cached_features
from pipelines.data.sets import cache_folder
from pipelines.kept import once

if TYPE_CHECKING:
    from pipelines.data.streaming import StreamedViews

Result = TypeVar("Result")

MOST_PROCESSES = 16  # what decodes for the fastest GPU; each holds two batches ready in shared memory


def views_of(config: Config, images: LabelledImages, resident: torch.Tensor | None = None) -> Views:
    """Return the views of a set's pictures, as the config has them. resident: see Views."""
    return Views(images, config.data.image_size, config.data.augmentation, resident)


class Sources:
    """Where a worker's batches come from: decoded pictures or, with a frozen backbone, its cached features.

    Attributes:
        config: Of the run.
        learner: Whose backbone computes features.
        device: Of this worker.
        cpus: CPUs of this worker.
        processes: Decoding processes of this worker.
        at_once: How many batches this worker computes on at the same time.
        progress: Told of features that are computed.
        data: What the whole set is: features belong to its pictures.
    """

    def __init__(
        self,
        config: Config,
        learner: Learner,
        device: torch.device,
        cpus: float,
        progress: Reporter,
        data: SetIdentity,
    ):
        self.config, self.learner, self.device, self.progress, self.data = config, learner, device, progress, data
        # Who writes to its node's disk. Ray Train itself would say so to its own workers, not in a trial of Ray Tune.
        self.writes = int(os.environ.get("LOCAL_RANK", 0)) == 0
        spare = max(0, int(cpus) - 1) if config.data.name != "glyphs" else 0
        asked_for = config.data.loader_processes
        self.processes = min(MOST_PROCESSES, spare) if asked_for is None else asked_for
        self.cpus = max(1, int(cpus))
        self.threads = ThreadPoolExecutor(self.cpus) if self.cpus > 1 and device.type == "cpu" else None
        self.at_once = self.cpus if self.threads else 1
        self._feature_files: list[tuple[LabelledImages, Path]] = []  # of whole sets
        self._residents: list[tuple[np.ndarray, torch.Tensor]] = []  # pictures, and what the device has of them

    def autocast(self, cache_enabled: bool = True) -> torch.autocast:
        """Return the context in which networks compute in the run's precision. cache_enabled: round weights once."""
        enabled = self.config.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=cache_enabled)

    def each(self, function: Callable[..., Result], *arguments: Iterable[Any]) -> Iterator[Result]:
        """Map a function in the run's precision, on as many CPUs as this worker has."""
        return (self.threads.map if self.threads else map)(self.autocast()(function), *arguments)

    def batches(self, images: LabelledImages, rows: Iterable[Rows]) -> Iterator[torch.Tensor]:
        """Yield batches of a set on this worker's device, one for each entry of `rows`: images, or features."""
        pinned = self.device.type == "cuda"
        processes = min(self.processes, len(rows)) if isinstance(rows, Sized) else self.processes  # one a batch
        return sent_ahead(self.of(images).batches(rows, processes, pinned), self.device)

    def of(self, images: LabelledImages) -> "Views | JpegViews | StreamedViews | Features":
        """Return what gives batches of a set: its views, or the features of a frozen backbone, computed when needed."""
        if not self.config.backbone.frozen:
            return self._views(images)
        return Features(self._feature_file(images.whole or images), images.places)

    def _feature_file(self, whole: LabelledImages) -> Path:
        for images, path in self._feature_files:
            if images is whole:
                return path

        config, pictures = self.config, (self.data.pictures, whole.digest())
        backbone = config.backbone.model_dump_json(), config.start_from, config.seed, config.precision, config.storage
        path = once(
            ("features", *pictures, config.data.model_dump_json(), *backbone), lambda: self._find_features(whole)
        )
        self._feature_files.append((whole, path))
        return path

    def _find_features(self, whole: LabelledImages) -> Path:
        def note(done: int, total: int) -> None:
            self.progress.note("features", done, total)

        with torch_threads(self.cpus):
            views, folder = self._views(whole), cache_folder()
            return cached_features(
                self.config, self.data, self.learner, views, folder, self.device, self.writes, self.processes, note
            )

    def _views(self, images: LabelledImages) -> "Views | JpegViews | StreamedViews":
        data = self.config.data
        if data.decode == "gpu":
            return JpegViews(images, data.image_size, data.augmentation, self.device)
        views = views_of(self.config, images, self._resident(images))
        if data.loader != "ray" or not images.files:
            return views
        from pipelines.data.streaming import StreamedViews  # Ray, which takes seconds

        return StreamedViews(views)

    def _resident(self, images: LabelledImages) -> torch.Tensor | None:
        """Return embedded pictures on the device, once for all parts of a set; None where they must be resized."""
        size, augmentation = self.config.data.image_size, self.config.data.augmentation
        if images.files or images.images.shape[1:] != (size, size) or augmentation == "crop":
            return None
        for pictures, resident in self._residents:
            if pictures is images.images:
                return resident
        self._residents.append((images.images, torch.from_numpy(images.images).to(self.device)))
        return self._residents[-1][1]
