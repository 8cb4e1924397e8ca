"""Pictures a second that reach a training loop, beside a plain torchvision ImageFolder and DataLoader.

    python benchmarks/ingest.py [--processes 2] [--pictures 600] [--epochs 10] [--folder grocery=ROOT] [--repeat 3]

The views are those of `data.augment=crop` at 224 pixels, the same transform for all, from JPEGs of 1,000 pixels that
are made here, and from a folder of your own. Some epochs in one go, as a training has them, the first of them not
counted; the ways in turn, median of the repeats. Plain: decoded by the loader of ImageFolder, at full size, by
processes that last over the epochs. Batches of 64.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import ray
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from dml_core.data.loading import Views
from dml_core.data.user_sets import load_folder
from pipelines.data.streaming import StreamedViews

SIZE, BATCH, SIDE = 224, 64, 1000


def make(root: Path, pictures: int) -> None:
    """Photograph-like JPEGs: noise, blurred to the spectrum of pictures."""
    rng = np.random.default_rng(0)
    for number in range(pictures):
        coarse = Image.fromarray(rng.integers(0, 255, (125, 125, 3), np.uint8)).resize((SIDE, SIDE))
        fine = Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8)).filter(ImageFilter.GaussianBlur(1))
        path = root / f"class {number % 10}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.blend(coarse, fine, 0.3).save(path, quality=90)


def plain(root: Path, epochs: int, processes: int) -> Iterator[Tensor]:
    crop = v2.RandomResizedCrop(SIZE, scale=(0.4, 1.0), ratio=(3 / 4, 4 / 3), antialias=True)
    view = v2.Compose([v2.PILToTensor(), crop, v2.RandomHorizontalFlip()])
    loader = DataLoader(ImageFolder(root, view), BATCH, True, num_workers=processes, persistent_workers=processes > 0)
    for _ in range(epochs):
        yield from (images for images, _ in loader)


def ours(views: Views | StreamedViews, epochs: int, processes: int) -> Iterator[Tensor]:
    rows = []
    for _ in range(epochs):
        order = torch.randperm(len(views.images))
        rows += [[(i, i) for i in part.tolist()] for part in order.split(BATCH)]
    return views.batches(rows, processes)


def speed(batches: Iterator[Tensor], warm: int) -> float:
    """Of what comes after `warm` pictures."""
    seen, started = 0, 0.0
    for batch in batches:
        if seen >= warm and not started:
            first, started = seen, time.perf_counter()
        seen += len(batch)
    return (seen - first) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--folder", default=None, help="NAME=ROOT of a class-per-folder tree")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    if options.epochs < 2:
        parser.error("--epochs: at least 2, as the first is not counted")
    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=options.processes, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as made:
        make(Path(made), options.pictures)
        folders = {f"{SIDE} px JPEGs": made}
        if options.folder:
            name, _, root = options.folder.partition("=")
            folders[name] = root
        print("| pictures | plain | data.loader=torch | data.loader=ray | torch / plain | ray / plain |")
        print("|---" * 6 + "|")
        for name, root in folders.items():
            views = Views(load_folder(root).images, SIZE, "crop")
            ways: dict[str, Callable[[int, int], Iterator[Tensor]]] = {
                "plain": partial(plain, root),
                "torch": partial(ours, views),
                "ray": partial(ours, StreamedViews(views)),
            }
            found: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(options.repeat):
                for way, batches in ways.items():
                    found[way].append(speed(batches(options.epochs, options.processes), len(views.images)))
            median = {way: statistics.median(values) for way, values in found.items()}
            cells = [name, *(f"{value:.0f}/s" for value in median.values())]
            cells += [f"{median[way] / median['plain']:.2f}" for way in ("torch", "ray")]
            print(f"| {' | '.join(cells)} |", flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
