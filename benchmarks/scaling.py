"""What a training step moves and takes with 8, 64 and 512 GPUs: formulas, constants measured here, and assumptions.

    python benchmarks/scaling.py [--repeats 7] [--per-gpu 16 64]

Measured on this machine, the least of the repeats: the exchanges of dml_core.gather between 2 and 4 gloo processes,
decoding of a picture, and head, loss and their gradients by the size of the global batch, with the memory they take.
Assumed: the hardware below. Predicted: a ResNet-50 with IAA over multi-similarity, by the formulas of docs/scaling.md,
which uses what is printed.
"""

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dml_core.gather import all_sum, broadcast, gather, rank, tree_sum
from dml_core.retrieval.neighbors import block_rows

BACKBONE, FEATURES, DIM = 23_508_032, 2048, 512  # ResNet-50 without its classifier, what it gives, the embedding
CLASSES, DRAWS = 100, 3  # of CUB's training half; IAA's synthetics of an embedding
SIZE, JPEG = 224, 100_000  # of a picture: pixels of a side, bytes of its file
SET, QUERIES = 5_864, 60_502  # pictures that IAA looks over (CUB's), of the largest published test (SOP's)
# Assumed of a machine of 8 GPUs; none of it was measured.
NVLINK, NETWORK = 200e9, 40e9  # bytes/s each way and GPU, within and between machines (a 400 Gbit/s port a GPU)
HOP = 20e-6  # seconds until a message of no bytes has arrived
GPU_IMAGES, GPU_FORWARD = 1000.0, 3000.0  # pictures/s through a ResNet-50 with its gradients, and without
GPU_FLOPS, GPU_MEMORY, GPU_BYTES = 20e12, 2e12, 80e9  # float32 operations/s, bytes/s, bytes
KERNELS = 5e-3  # seconds that head and loss take whatever the batch: some hundred kernels, one after the other
PASSES = 3  # how often what memory holds of a pair is written or read
STORAGE = 500e6  # bytes/s to the shared folder


def timed(task: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """The least of the repeats: what else runs on the machine only ever adds."""
    times = []
    for _ in range(repeats + 1):
        started = clock()
        task()
        times.append(clock() - started)
    return min(times[1:])


def exchanges(number: int, world: int, store: str, repeats: int) -> None:
    """In one process of a group: milliseconds of each exchange, printed by rank 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=number, world_size=world)
    cases: list[tuple[str, int, Callable[[torch.Tensor], object], float]] = []
    for batch in (128, 1024):
        numbers = batch // world * FEATURES
        cases.append((f"gather of {batch} x {FEATURES}", numbers, lambda x: gather(x.view(-1, FEATURES)), world - 1))
    for millions in (1, 5, 24):
        moved = math.log2(world)
        cases.append((f"tree_sum of {millions} M", millions * 10**6, lambda x: tree_sum([x]), moved))
    cases.append(("broadcast of 1 M (head)", FEATURES * DIM, lambda x: broadcast(x, 0), 1))
    sums = CLASSES * (1 + 2 * DIM)
    cases.append((f"all_sum of {CLASSES} classes", sums, lambda x: all_sum(x.double()), 2 * 2 * (world - 1) / world))
    for name, numbers, exchange, factor in cases:
        x = torch.ones(numbers)

        def synchronised(exchange=exchange, x=x) -> None:  # type: ignore[no-untyped-def]
            dist.barrier()
            exchange(x)

        seconds = max(1e-6, timed(synchronised, repeats) - timed(dist.barrier, repeats))
        if rank() == 0:
            moved = factor * numbers * 4
            rate = moved / seconds / 1e9
            print(f"| {name:<26} | {world} | {moved / 1e6:8.1f} | {seconds * 1e3:8.1f} | {rate:5.2f} |", flush=True)
    dist.destroy_process_group()


def group(world: int, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        given = world, f"file://{folder}/store", repeats
        others = [mp.get_context("fork").Process(target=exchanges, args=(n, *given)) for n in range(1, world)]
        for other in others:
            other.start()
        exchanges(0, *given)
        for other in others:
            other.join()


def decoding(repeats: int) -> float:
    """Seconds of a core for a view of a JPEG of 500 x 375 pixels."""
    import numpy as np
    from PIL import Image, ImageFilter

    from dml_core.data import transforms
    from dml_core.data.loading import Views
    from dml_core.data.user_sets import load_folder

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as root:
        for number in range(32):
            noise = Image.fromarray(rng.integers(0, 255, (375, 500, 3), np.uint8)).filter(ImageFilter.GaussianBlur(1))
            path = Path(root, f"class {number % 2}", f"{number}.jpg")
            path.parent.mkdir(exist_ok=True)
            noise.save(path, quality=90)
        crop = transforms.training_view("crop", SIZE)
        views = Views(load_folder(root).images, transforms.evaluation_view(SIZE), crop)
        return timed(lambda: views.batch([(i, i) for i in range(32)]), repeats, time.process_time) / 32


def behind_the_backbone(batch: int, repeats: int) -> tuple[float, int]:
    """Seconds of a core for head, synthesis, loss and their gradients; bytes that memory grows by meanwhile."""
    from losses import grown

    from dml_core.heads import linear
    from pipelines.config.recipe import load_recipe
    from pipelines.models.build import build_learner

    config = load_recipe("cub-iaa", ["data.root=unused", "backbone.name=small", "backbone.weights=none"])
    learner = build_learner(config, CLASSES)
    learner.head = linear(FEATURES, DIM)
    assert learner.iaa is not None
    seen = torch.arange(8 * CLASSES) % CLASSES
    learner.iaa.estimate([(torch.randn(len(seen), DIM), seen)])
    labels = torch.arange(batch) // 4 % CLASSES
    features = torch.randn(batch, FEATURES, requires_grad=True)
    parameters, generator = [features, *learner.head.parameters()], torch.Generator()

    def step() -> None:
        torch.autograd.grad(learner(features, labels, config.epochs, generator).loss, parameters)

    step()
    return timed(step, repeats, time.process_time), grown(step)


def predicted(per_gpu: int, decode: float, held: float) -> None:
    """held: bytes for a pair of an embedding and another, or a synthetic."""
    print(f"\n{per_gpu} pictures a GPU:\n")
    worlds = (8, 64, 512)
    rows: dict[str, list[str]] = {}
    totals = [0.0] * len(worlds)

    def row(name: str, cell: Callable[[int], tuple[str, float]]) -> None:
        found = [cell(world) for world in worlds]
        rows[name] = [text for text, _ in found]
        for i, (_, seconds) in enumerate(found):
            totals[i] += seconds

    def moved(size: float, seconds: float) -> tuple[str, float]:
        return f"{size / 1e6:,.1f} MB, {seconds * 1e3:,.1f} ms", seconds

    def features(world: int) -> tuple[str, float]:
        size = (world - 1) * per_gpu * (FEATURES * 4 + 8)
        return moved(size, size / (NETWORK if world > 8 else NVLINK) + (world - 1) * HOP)

    def gradients(world: int) -> tuple[str, float]:
        levels, size = int(math.log2(world)), BACKBONE * 4
        outside = max(0, levels - 3)
        return moved(levels * size, (levels - outside) * size / NVLINK + outside * size / NETWORK + levels * HOP)

    def head(world: int) -> tuple[str, float]:
        size = FEATURES * DIM * 4
        return moved(size, size / (NETWORK if world > 8 else NVLINK) + math.log2(world) * HOP)

    def pairs(world: int) -> float:
        return (per_gpu * world) ** 2 * (1 + DRAWS)

    def losses(world: int) -> tuple[str, float]:
        flops = 3 * 2 * (per_gpu * world * FEATURES * DIM + pairs(world) * DIM)
        seconds = KERNELS + flops / GPU_FLOPS + PASSES * pairs(world) * held / GPU_MEMORY
        fits = "" if pairs(world) * held < GPU_BYTES else ", does not fit"
        return f"{pairs(world) * held / 1e9:,.2f} GB{fits}, {seconds * 1e3:,.0f} ms", seconds

    row("global batch", lambda w: (f"{per_gpu * w:,}", 0.0))
    row("backbone", lambda w: (f"{per_gpu / GPU_IMAGES * 1e3:,.0f} ms", per_gpu / GPU_IMAGES))
    row("gather of features and labels", features)
    row("head and losses, on every GPU", losses)
    row("tree of the backbone's gradient", gradients)
    row("broadcast of the head's gradient", head)
    rows["**step**"] = [f"**{seconds * 1e3:,.0f} ms**" for seconds in totals]
    rows["pictures/s"] = [f"{per_gpu * w / s:,.0f}" for w, s in zip(worlds, totals, strict=True)]
    rows["of backbones alone"] = [f"{per_gpu / GPU_IMAGES / s:.0%}" for s in totals]
    speeds = [per_gpu / s for s in totals]
    rows["CPUs a GPU to decode"] = [f"{s * decode:.1f}" for s in speeds]
    rows["read, decoded: all GPUs"] = [
        f"{w * s * JPEG / 1e9:,.1f}, {w * s * 3 * SIZE**2 / 1e9:,.1f} GB/s" for w, s in zip(worlds, speeds, strict=True)
    ]
    print(f"| | {' | '.join(f'{w} GPUs' for w in worlds)} |")
    print("|---" * (1 + len(worlds)) + "|")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


def besides() -> None:
    """What is not of a step, and hardly depends on the batch."""
    worlds = (8, 64, 512)
    rows: dict[str, list[str]] = {"IAA: look over the set": [], "evaluation": [], "checkpoint": []}
    for world in worlds:
        rate = NETWORK if world > 8 else NVLINK
        sums = CLASSES * (1 + 2 * DIM) * 8
        seconds = most(SET, world) / GPU_FORWARD + 2 * sums / rate + 2 * (world - 1) * HOP
        rows["IAA: look over the set"].append(
            f"{busy(SET, world)} GPUs busy, {seconds:.2f} s, sums {sums / 1e6:.1f} MB"
        )
        size, own = QUERIES * DIM * 4, most(QUERIES, world)
        seconds = own / GPU_FORWARD + size / rate + own * QUERIES * DIM / GPU_FLOPS  # each pair is multiplied once
        rows["evaluation"].append(f"{busy(QUERIES, world)} GPUs busy, {seconds:.2f} s, gallery {size / 1e6:,.0f} MB")
        weights = (BACKBONE + FEATURES * DIM) * 4 * 3
        rows["checkpoint"].append(f"{weights / 1e6:,.0f} MB by rank 0, {weights / STORAGE:.1f} s")
    print(f"\n| besides steps | {' | '.join(f'{w} GPUs' for w in worlds)} |\n|---|---|---|---|")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


def busy(total: int, world: int) -> int:
    """Processes that own a block of a set."""
    return min(world, -(-total // block_rows(total)))


def most(total: int, world: int) -> int:
    """Rows that a process owns at most."""
    return min(total, -(-total // (block_rows(total) * world)) * block_rows(total))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--per-gpu", type=int, nargs="+", default=[16, 64])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, gloo over loopback; MB that a process receives\n")
    print("| exchange | processes | MB | ms | GB/s |\n|---|---|---|---|---|")
    for world in (2, 4):
        group(world, options.repeats)
    decode = decoding(options.repeats)
    print(f"\ndecoding and cropping a JPEG of 500 x 375 pixels to {SIZE}: {decode * 1e3:.1f} ms of a core\n")
    print("| global batch | head, synthesis, loss and gradients, ms of a core | memory, MB |\n|---|---|---|")
    grows: dict[int, int] = {}
    for batch in (128, 256, 512, 1024, 2048):
        seconds, grows[batch] = behind_the_backbone(batch, options.repeats)
        print(f"| {batch} | {seconds * 1e3:.0f} | {grows[batch] / 1e6:.0f} |", flush=True)
    # What grows with the square of the batch: f(2b) - 2 f(b) = 2 b^2 (1 + DRAWS) times what a pair takes.
    held = (grows[2048] - 2 * grows[1024]) / (2 * 1024**2 * (1 + DRAWS))
    print(f"\na pair of an embedding and another or a synthetic takes {held:.0f} bytes")
    for per_gpu in options.per_gpu:
        predicted(per_gpu, decode, held)
    besides()


if __name__ == "__main__":
    main()
