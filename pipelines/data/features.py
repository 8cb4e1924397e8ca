"""Features of a frozen backbone: computed once, by all workers, and kept on each node's disk.

Where runs are stored in a bucket, the features are kept there too, for nodes that come later.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.fs
import torch
from torch import Tensor

from dml_core.data.datasets import LabelledImages, SetIdentity
from dml_core.data.jpegs import JpegViews
from dml_core.data.loading import Views, sent_ahead
from dml_core.data.sampling import Rows, blocks
from dml_core.gather import all_sum, gather, rank, world_size
from dml_core.learner import Learner
from pipelines.config.schema import Config
from pipelines.files import partial_file

if TYPE_CHECKING:
    from pipelines.data.streaming import StreamedViews

BATCH = {"cpu": 16, "cuda": 256}  # pictures at a time; the same at any worker count, hence the same bits


class Features:
    """Features (N, F) in a file, asked for like Views: by (sample, seed), where the seed changes nothing."""

    def __init__(self, path: Path, places: np.ndarray | None):
        """Open a file. places: the rows of a part of the set; None: the whole set."""
        self.rows, self.places = np.load(path, mmap_mode="r"), places

    def batches(self, rows: Iterable[Rows], processes: int = 0, pinned: bool = False) -> Iterator[Tensor]:
        """Yield features (b, F), one tensor for each entry of `rows`. processes, pinned: not used; see Views."""
        for batch in rows:
            samples = np.array([sample for sample, _ in batch])
            yield torch.from_numpy(self.rows[samples if self.places is None else self.places[samples]])


def cached_features(
    config: Config,
    data: SetIdentity,
    learner: Learner,
    views: "Views | JpegViews | StreamedViews",
    folder: Path,
    device: torch.device,
    writes: bool,
    processes: int,
    progress: Callable[[int, int], None],
) -> Path:
    """Return a file with the features of every picture's evaluation view, (N, F), computed before or now.

    Args:
        config: Of the run.
        data: What the set is, of which `views` may leave out pictures and classes.
        learner: Whose backbone computes them.
        views: Of the whole set.
        folder: On this node's disk, for caches.
        device: Of this worker.
        writes: Whether this rank writes to its node's disk: one rank of each node does.
        processes: Decoding processes of this worker.
        progress: Called with (done, total).
    """
    path = folder / "features" / f"{_key(config, data, learner, views.images)}.npy"
    files, root = pyarrow.fs.FileSystem.from_uri(config.storage)
    bucket = None if isinstance(files, pyarrow.fs.LocalFileSystem) else f"{root}/features/{path.name}"
    if writes and bucket and not path.is_file() and files.get_file_info(bucket).is_file:
        with partial_file(path) as partial:
            pyarrow.fs.copy_files(bucket, str(partial), files, pyarrow.fs.LocalFileSystem())
    missing = all_sum(torch.tensor([float(writes and not path.is_file())], device=device))
    if missing.item():
        _compute(learner, views, path, device, writes, processes, progress)
        if rank() == 0 and bucket:
            files.create_dir(f"{root}/features")
            pyarrow.fs.copy_files(str(path), bucket, pyarrow.fs.LocalFileSystem(), files)
        all_sum(missing)  # wait until every node has its file
    return path


def _compute(
    learner: Learner,
    views: "Views | JpegViews | StreamedViews",
    path: Path,
    device: torch.device,
    writes: bool,
    processes: int,
    progress: Callable[[int, int], None],
) -> None:
    count, dtype, size = len(views.images), next(learner.parameters()).dtype, BATCH[device.type]
    target: AbstractContextManager[Path | None] = partial_file(path) if writes else nullcontext()
    with target as partial:
        file = None
        if partial is not None:
            file = np.lib.format.open_memmap(
                partial, "w+", dtype=torch.zeros(0, dtype=dtype).numpy().dtype, shape=(count, learner.backbone.dim)
            )
        own_rows = blocks(count, size, rank(), world_size(), size)
        own_batches = sent_ahead(views.batches(own_rows, processes, device.type == "cuda"), device)
        for start in range(0, count, size * world_size()):
            images = next(own_batches, None)
            rows = torch.zeros(size, learner.backbone.dim, dtype=dtype, device=device)
            if images is not None:
                with torch.inference_mode():
                    rows[: len(images)] = learner.features(images).to(dtype)
            rows = gather(rows)
            if file is not None:
                file[start : start + len(rows)] = rows[: count - start].cpu().numpy()
            progress(min(count, start + len(rows)), count)
        if file is not None:
            file.flush()


def _key(config: Config, data: SetIdentity, learner: Learner, images: LabelledImages) -> str:
    """Hash what features depend on: pictures, backbone with its weights, size and decoder of views, precision."""
    h = hashlib.sha256(f"{data.pictures} {images.digest()}".encode())
    h.update(f"{config.backbone.name} {config.data.image_size} {config.data.decode} {config.precision}".encode())
    for name, tensor in learner.backbone.state_dict().items():
        h.update(name.encode() + tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:24]
