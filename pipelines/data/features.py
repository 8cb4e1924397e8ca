"""Features of a frozen backbone: computed once, by all workers, and kept on each node's disk.

Where runs are stored in a bucket, the features are kept there too, for nodes that come later.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.fs
import torch
from torch import Tensor

from dml_core.data.loading import Views
from dml_core.data.sampling import Rows, blocks
from dml_core.gather import all_sum, gather, rank, world_size
from dml_core.learner import Learner
from pipelines.config.schema import Config
from pipelines.data.streaming import StreamedViews

BATCH = {"cpu": 16, "cuda": 256}  # pictures at a time; the same at any worker count, hence the same bits


class Features:
    """(N, F) rows in a file, asked for like Views: by (sample, seed), where the seed changes nothing.

    places: where in the file the samples of a part of the set are; None: the whole set.
    """

    def __init__(self, path: Path, places: np.ndarray | None):
        self.rows, self.places = np.load(path, mmap_mode="r"), places

    def batches(self, rows: Iterable[Rows], processes: int = 0) -> Iterator[Tensor]:
        for batch in rows:
            samples = np.array([sample for sample, _ in batch])
            yield torch.from_numpy(self.rows[samples if self.places is None else self.places[samples]])


def cached(
    config: Config,
    learner: Learner,
    views: Views | StreamedViews,
    folder: Path,
    device: torch.device,
    writes: bool,
    processes: int,
    progress: Callable[[int, int], None],
) -> Path:
    """A file with the features of the evaluation view of every picture, made before or now.

    folder: on this node's disk.  writes: true on one rank of each node.  progress: called with (done, of).
    """
    path = folder / "features" / f"{_key(config, learner, views)}.npy"
    files, root = pyarrow.fs.FileSystem.from_uri(config.storage)
    bucket = None if isinstance(files, pyarrow.fs.LocalFileSystem) else f"{root}/features/{path.name}"
    partial = path.with_suffix(f".{os.getpid()}.partial")
    if writes and bucket and not path.is_file() and files.get_file_info(bucket).is_file:
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.fs.copy_files(bucket, str(partial), files, pyarrow.fs.LocalFileSystem())
        os.replace(partial, path)
    missing = all_sum(torch.tensor([float(writes and not path.is_file())], device=device))
    if missing.item():
        _compute(learner, views, path, partial, device, writes, processes, progress)
        if rank() == 0 and bucket:
            files.create_dir(f"{root}/features")
            pyarrow.fs.copy_files(str(path), bucket, pyarrow.fs.LocalFileSystem(), files)
        all_sum(missing)  # wait until every node has its file
    return path


def _compute(
    learner: Learner,
    views: Views | StreamedViews,
    path: Path,
    partial: Path,
    device: torch.device,
    writes: bool,
    processes: int,
    progress: Callable[[int, int], None],
) -> None:
    count, dtype, size = len(views.images), next(learner.parameters()).dtype, BATCH[device.type]
    file = None
    if writes:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = np.lib.format.open_memmap(
            partial, "w+", dtype=torch.zeros(0, dtype=dtype).numpy().dtype, shape=(count, learner.backbone.dim)
        )
    try:
        mine = views.batches(blocks(count, size, rank(), world_size(), size), processes)
        for start in range(0, count, size * world_size()):
            images = next(mine, None)
            rows = torch.zeros(size, learner.backbone.dim, dtype=dtype, device=device)
            if images is not None:
                with torch.inference_mode():
                    rows[: len(images)] = learner.features(images.to(device)).to(dtype)
            rows = gather(rows)
            if file is not None:
                file[start : start + len(rows)] = rows[: count - start].cpu().numpy()
            progress(min(count, start + len(rows)), count)
        if file is not None:
            file.flush()
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _key(config: Config, learner: Learner, views: Views | StreamedViews) -> str:
    """Of what features depend on: pictures, backbone with its weights, transform, precision."""
    h = hashlib.sha256(views.images.digest(stamps=True).encode())
    h.update(
        f"{config.backbone.name}|{config.data.image_size}|{views.evaluation.transform}|{config.precision}".encode()
    )
    for name, tensor in learner.backbone.state_dict().items():
        h.update(name.encode() + tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:24]
