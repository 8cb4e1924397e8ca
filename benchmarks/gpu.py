"""What a GPU is asked for, each row beside its peer: step, losses, search, correction, pictures, and whole commands.

    python benchmarks/gpu.py [--device cuda] [--small] [--only step losses search correction pictures commands]

It needs nothing from a network. Photographs are looked for in DML_SHARED/data/GroceryStoreDataset, or in ../shared;
without them their rows are left out, which is said. `--device cpu --small` shows on any machine that it runs. The
tables are those of step.py, losses.py, retrieval.py and ingest.py, which have more rows.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ingest
import losses
import retrieval
import step
import torch

from dml_core.cpus import usable_cpus
from dml_core.data.benchmarks import load_grocery
from dml_core.data.loading import Views
from dml_core.data.user_sets import load_folder

STEPS = r"^plain loop(, compiled|, float32)?$|^exact, [14] slices(, all methods|, compiled|, float32)?$|^ddp$"
SETS = ((60_502, 512, 5), (200_000, 128, 10), (1_000_000, 128, 10))  # images, dimensions, images a class
FINE_TUNING = ["backbone.frozen=false", "data.augment=crop", "data.image_size=224", "epochs=8", "optimizer.lr=1e-4"]
FINE_TUNING += ["optimizer.head_multiplier=5"]
SHORT = ["epochs=1", "steps_per_epoch=2", "batch.classes=4", "batch.images=4"]
OURS = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")


class Sections:
    """The tables, on one device.

    Args:
        device: cuda or cpu.
        small: Whether sizes only show that it runs.
    """

    def __init__(self, device: str, small: bool):
        self.device, self.small = device, small
        self.repeats = 2 if small else 20

    def step(self) -> None:
        size = {"backbone": "small", "size": 32, "batch": 16} if self.small else {}
        defaults = {"backbone": "resnet50", "size": 224, "batch": 128}
        measured = step.Measured(argparse.Namespace(**defaults | size, repeat=self.repeats))
        step.print_steps(measured, "^plain loop$|^exact, [14] slices$" if self.small else STEPS)
        print()
        step.print_behind(measured)

    def losses(self) -> None:
        losses.row("forward and backward, median (best) ms", "ours", "loop", "library")
        losses.row("-" * 42, *["-" * 19] * 3)
        losses.print_terms(self.device, [16] if self.small else [128, 1024, 4096], self.repeats)

    def search(self) -> None:
        print("| images x dimensions | metrics, s | bare product, s | ratio | GiB | MAP@R |\n|---|---|---|---|---|---|")
        for size, dim, images in [(2000, 32, 5)] if self.small else SETS:
            found = retrieval.measure_search(size, dim, images, self.device, 1 if size > 500_000 else 3)
            times = f"{found.metrics:.2f} | {found.product:.2f} | {found.ratio:.2f} | {found.gib:.1f}"
            print(f"| {size:,} x {dim} | {times} | {found.map_at_r:.4f} |", flush=True)

    def correction(self) -> None:
        losses.row("512 dimensions", "ms", "", "memory / input")
        losses.row("-" * 42, *["-" * 19] * 3)
        losses.print_correction(self.device, [500] if self.small else [11_318, 200_000])

    def pictures(self) -> None:
        device = torch.device(self.device)
        at_once, one_by_one = ingest.embedded_views_per_second(device, 2 if self.small else 200)
        print(f"views of glyphs: {at_once:,.0f}/s in batches, {one_by_one:,.0f}/s one by one by torchvision\n")
        processes = max(1, usable_cpus() - 1)
        with tempfile.TemporaryDirectory() as root:
            ingest.make_jpegs(Path(root), 64 if self.small else 2048, 500)
            sets = {"500 px JPEGs": load_folder(root).images}
            if not self.small and (found := grocery()):
                sets["grocery"] = load_grocery(found).images
            print("| pictures | images/s | waits for data at 2,000 images/s |\n|---|---|---|")
            for name, images in sets.items():
                views = Views(images, ingest.SIZE, "crop")
                epochs, warm = (2, 0) if self.small else (4, len(views.images))
                speed = ingest.images_per_second(ingest.our_batches(views, epochs, processes, device), warm)
                waits = ingest.data_wait(ingest.our_batches(views, epochs, processes, device), 2000, warm)
                print(f"| {name} | {speed:,.0f} | {waits:.3f} |", flush=True)

    def commands(self) -> None:
        short = SHORT if self.small else []
        commands = {"dml train glyphs": ["glyphs", *short, *(["data.limit_classes=12"] if self.small else [])]}
        if not self.small and (found := grocery()):
            commands["dml train grocery " + " ".join(FINE_TUNING)] = ["grocery", f"data.root={found}", *FINE_TUNING]
        print("| command | seconds | images/s | data_wait | R@1 | MAP@R |\n|---|---|---|---|---|---|")
        for name, arguments in commands.items():
            with tempfile.TemporaryDirectory() as folder:
                print(f"| `{name}` | {' | '.join(train(arguments, self.device, folder))} |", flush=True)


def train(arguments: list[str], device: str, folder: str) -> list[str]:
    """Train by the command line in an empty folder; return seconds, speed, share of waiting, R@1 and MAP@R."""
    environment = {key: value for key, value in os.environ.items() if key not in OURS} | {"DML_CACHE": folder}
    command = [sys.executable, "-m", "pipelines.cli", "train", *arguments, f"use_gpu={device == 'cuda'}", "--json"]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, check=True)
    seconds = time.perf_counter() - began
    outcome = json.loads(done.stdout.splitlines()[-1])
    metrics = outcome["metrics"]
    return [
        *(f"{seconds:.0f}", f"{outcome['images_per_second']:,.0f}", f"{metrics['train/data_wait']:.3f}"),
        *(f"{100 * metrics[name]:.1f}" for name in ("test/recall_at_1", "test/map_at_r")),
    ]


def grocery() -> Path | None:
    """Return the folder of the Grocery Store Dataset; None, which is said, where it is not here."""
    shared = Path(os.environ.get("DML_SHARED", Path(__file__).parents[2] / "shared"))
    folder = shared / "data" / "GroceryStoreDataset"
    if folder.is_dir():
        return folder
    print(f"{folder}: not here; its rows are left out")
    return None


def main() -> None:
    sections = ("step", "losses", "search", "correction", "pictures", "commands")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", nargs="+", choices=sections, default=sections)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; --device cpu --small shows that it runs")
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    tables = Sections(options.device, options.small)
    for section in options.only:
        print(f"\n## {section}\n", flush=True)
        began = time.perf_counter()
        table: Callable[[], None] = getattr(tables, section)
        table()
        print(f"\n{section}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
