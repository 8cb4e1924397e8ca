"""Pictures a second that reach a training loop, beside a plain torchvision ImageFolder and DataLoader.

    python benchmarks/ingest.py [--device cpu] [--processes 2] [--pictures 600] [--epochs 10] [--folder grocery=ROOT]
        [--repeat 3] [--rate 2000]

The views are those of `data.augment=crop` at 224 pixels, from JPEGs of 1,000 and of 500 pixels that are made here, and
from a folder of your own. Some epochs in one go, as a training has them, the first of them not counted; the ways in
turn, median of the repeats. Plain: torchvision's random resized crop and flip, decoded by the loader of ImageFolder, at
full size, by processes that last over the epochs. Batches of 64. On a GPU batches end there, and data.decode=gpu is
measured, too. Then what a core does by itself, how long a loop waits that takes `rate` images/s, and the views of the
embedded set, a batch at once and one by one.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from dml_core.data import glyphs
from dml_core.data.datasets import LabelledImages
from dml_core.data.jpegs import JpegViews
from dml_core.data.loading import Views, sent_ahead
from dml_core.data.sampling import Rows
from dml_core.data.user_sets import load_folder
from pipelines.data.sets import cache_folder

SIZE, BATCH, SIDES = 224, 64, (1000, 500)
CROP = v2.RandomResizedCrop(SIZE, scale=(0.4, 1.0), ratio=(3 / 4, 4 / 3), antialias=True)
PLAIN = v2.Compose([v2.PILToTensor(), CROP, v2.RandomHorizontalFlip()])
SHIFT = v2.RandomAffine(degrees=8, translate=(0.08, 0.08), scale=(0.9, 1.1), shear=6)


class Source(Protocol):
    """What gives views: Views, JpegViews or StreamedViews."""

    images: LabelledImages

    def batches(self, rows: Iterable[Rows], processes: int = 0, pinned: bool = False) -> Iterator[Tensor]: ...


def make_jpegs(root: Path, pictures: int, side: int) -> None:
    """Write photograph-like JPEGs in ten class folders: noise, blurred to the spectrum of pictures."""
    rng = np.random.default_rng(0)
    for number in range(pictures):
        coarse = Image.fromarray(rng.integers(0, 255, (side // 8, side // 8, 3), np.uint8)).resize((side, side))
        fine = Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8)).filter(ImageFilter.GaussianBlur(1))
        path = root / f"class {number % 10}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.blend(coarse, fine, 0.3).save(path, quality=90)


def plain_batches(root: str, epochs: int, processes: int, device: torch.device) -> Iterator[Tensor]:
    """Yield batches of torchvision's views on a device, as a plain training has them."""
    loader = DataLoader(ImageFolder(root, PLAIN), BATCH, True, num_workers=processes, persistent_workers=processes > 0)
    for _ in range(epochs):
        yield from (images.to(device) for images, _ in loader)


def our_batches(views: Source, epochs: int, processes: int, device: torch.device) -> Iterator[Tensor]:
    """Yield batches of random views on a device."""
    rows: list[Rows] = []
    for epoch in range(epochs):
        order = torch.randperm(len(views.images))
        rows += [[(i, epoch * len(order) + i) for i in part.tolist()] for part in order.split(BATCH)]
    return sent_ahead(views.batches(rows, processes, device.type == "cuda"), device)


def images_per_second(batches: Iterator[Tensor], warm: int) -> float:
    """Return how many images a second come after the first `warm` ones, on their device."""
    seen, started = 0, 0.0
    for batch in batches:
        if seen >= warm and not started:
            batch.sum().item()  # all before has come
            first, started = seen, time.perf_counter()
        seen += len(batch)
    batch.sum().item()
    return (seen - first) / (time.perf_counter() - started)


def data_wait(batches: Iterator[Tensor], rate: float, warm: int) -> float:
    """Return the share of its time that a loop waits for data which takes `rate` images/s, after the first `warm`."""
    seen, waited, started = 0, 0.0, time.perf_counter()
    while True:
        asked = time.perf_counter()
        if (batch := next(batches, None)) is None:
            return waited / (asked - started)
        if seen >= warm:
            waited += time.perf_counter() - asked
        else:
            started = time.perf_counter()
        seen += len(batch)
        time.sleep(len(batch) / rate)


def core_images_per_second(views: Views, plain_root: str | None = None) -> float:
    """Return how many views of photographs a second of a core makes; plain_root: of torchvision's, from that folder."""
    rows, plain = range(min(BATCH, len(views.images))), ImageFolder(plain_root, PLAIN) if plain_root else None
    seconds = []
    for epoch in range(4):
        began = time.process_time()
        if plain is None:
            views.batch([(row, epoch * BATCH + row) for row in rows])
        else:
            torch.stack([plain[row][0] for row in rows])
        seconds.append(time.process_time() - began)
    return len(rows) / min(seconds)


def embedded_views_per_second(device: torch.device, repeats: int = 20) -> tuple[float, float]:
    """Return how many views of glyphs a second a device makes in batches of 128, and torchvision one by one."""
    images = glyphs.load(cache_folder()).images
    resident = torch.from_numpy(images).to(device)
    views = Views(LabelledImages(images, np.zeros(len(images), np.int64), ("",)), images.shape[1], "shift", resident)
    rows: list[Rows] = [[(37 * row, step * 128 + row) for row in range(128)] for step in range(repeats + 1)]
    at_once = images_per_second(views.batches(rows), 128)
    began = time.perf_counter()
    for row in range(128):
        SHIFT(torch.from_numpy(images[row]).expand(3, -1, -1).contiguous())
    return at_once, 128 / (time.perf_counter() - began)


def compare_loaders(folders: dict[str, str], options: argparse.Namespace, device: torch.device) -> None:
    """Print a table of the ways to a training loop."""
    import ray

    from pipelines.data.streaming import StreamedViews

    ray.init(address="local", num_cpus=options.processes, include_dashboard=False, log_to_driver=False)
    names = ["plain", "data.loader=torch", "data.loader=ray", *(["data.decode=gpu"] if device.type == "cuda" else [])]
    ratios = [f"{name.partition('=')[2]} / plain" for name in names[1:]]
    print(f"| {' | '.join(['pictures', *names, *ratios])} |")
    print("|---" * (2 * len(names)) + "|")
    for name, root in folders.items():
        images = load_folder(root).images
        sources: dict[str, Source] = {names[1]: Views(images, SIZE, "crop")}
        sources[names[2]] = StreamedViews(Views(images, SIZE, "crop"))
        if device.type == "cuda":
            sources[names[3]] = JpegViews(images, SIZE, "crop", device)
        ways: dict[str, Callable[[], Iterator[Tensor]]]
        ways = {"plain": partial(plain_batches, root, options.epochs, options.processes, device)}
        for way, views in sources.items():
            ways[way] = partial(our_batches, views, options.epochs, options.processes, device)
        speeds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.repeat):
            for way, batches in ways.items():
                speeds[way].append(images_per_second(batches(), len(images)))
        median = {way: statistics.median(values) for way, values in speeds.items()}
        cells = [name, *(f"{value:.0f}/s" for value in median.values())]
        cells += [f"{median[way] / median['plain']:.2f}" for way in names[1:]]
        print(f"| {' | '.join(cells)} |", flush=True)
    ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--folder", default=None, help="NAME=ROOT of a class-per-folder tree")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rate", type=float, default=2000, help="images/s of the loop that may have to wait")
    options = parser.parse_args()
    if options.epochs < 2:
        parser.error("--epochs: at least 2, as the first is not counted")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folders = {f"{side} px JPEGs": str(Path(made, str(side))) for side in SIDES}
        for side, root in zip(SIDES, folders.values(), strict=True):
            make_jpegs(Path(root), options.pictures, side)
        if options.folder:
            name, _, folders[name] = options.folder.partition("=")
        compare_loaders(folders, options, options.device)
        print(f"\n| pictures | a core, plain | a core | ratio | data_wait at {options.rate:.0f}/s |")
        print("|---" * 5 + "|")
        for name, root in folders.items():
            views = Views(load_folder(root).images, SIZE, "crop")
            plain, own = core_images_per_second(views, root), core_images_per_second(views)
            batches = our_batches(views, options.epochs, options.processes, options.device)
            waited = data_wait(batches, options.rate, len(views.images))
            print(f"| {name} | {plain:.0f}/s | {own:.0f}/s | {own / plain:.2f} | {waited:.0%} |", flush=True)
    at_once, single = embedded_views_per_second(options.device)
    print(f"\nembedded set: {at_once:,.0f} views/s at once on {options.device}, {single:,.0f}/s one by one", flush=True)


if __name__ == "__main__":
    main()
