"""What a training step moves and takes with 8, 64 and 512 GPUs: formulas, constants measured here, and assumptions.

    python benchmarks/scaling.py [--repeats 7] [--per-gpu 16 64] [--formulas]

Counted by dml_core.gather: the messages of the tree of gradients. Measured on this machine, the least of the repeats:
the exchanges of dml_core.gather between 2, 3 and 4 gloo processes, decoding of a picture, and head, loss and their
gradients by the size of the global batch, with the memory they take. Assumed: the hardware below. Predicted: a
ResNet-50 with IAA over multi-similarity, and the exchange of gradients by gradients=exact and gradients=ddp, by the
formulas of docs/scaling.md, which uses what is printed.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dml_core.cpus import usable_cpus
from dml_core.gather import all_sum, broadcast, gather, is_power_of_two, rank, slices_of, tree, tree_sum
from dml_core.retrieval.neighbors import block_rows

BACKBONE, FEATURES, DIM = 23_508_032, 2048, 512  # ResNet-50 without its classifier, what it gives, the embedding
CLASSES, DRAWS = 100, 3  # of CUB's training half; IAA's synthetics of an embedding
SIZE, JPEG = 224, 100_000  # of a picture: pixels of a side, bytes of its file
SET, QUERIES = 5_864, 60_502  # pictures that IAA looks over (CUB's), of the largest published test (SOP's)
BUCKET, FIRST_BUCKET = 25 * 2**20, 2**20  # bytes: what DistributedDataParallel joins, by its defaults
# Assumed of a machine of 8 GPUs; none of it was measured.
MACHINE = 8
NVLINK, NETWORK = 200e9, 40e9  # bytes/s each way and GPU, within and between machines (a 400 Gbit/s port a GPU)
HOP = 20e-6  # seconds until a message of no bytes has arrived
GPU_IMAGES, GPU_FORWARD = 1000.0, 3000.0  # pictures/s through a ResNet-50 with its gradients, and without
BACKWARD = 2 / 3  # of the time of a step in the backbone; gradients become ready evenly in it
GPU_FLOPS, GPU_MEMORY, GPU_BYTES = 20e12, 2e12, 80e9  # float32 operations/s, bytes/s, bytes
KERNELS = 5e-3  # seconds that head and loss take whatever the batch: some hundred kernels, one after the other
PASSES = 3  # how often what memory holds of a pair is written or read
STORAGE = 500e6  # bytes/s to the shared folder


def timed(
    task: Callable[[], object],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[], object] = bool,
) -> float:
    """The least of the repeats: what else runs on the machine only ever adds. before: called each time, untimed."""
    times = []
    for _ in range(repeats + 1):
        before()
        started = clock()
        task()
        times.append(clock() - started)
    return min(times[1:])


def exchanges(number: int, world: int, store: str, repeats: int) -> None:
    """In one process of a group: milliseconds of each exchange, printed by rank 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=number, world_size=world)
    cases: list[tuple[str, int, Callable[[torch.Tensor], object], float]] = []
    for batch in (128, 1024) if is_power_of_two(world) else ():
        numbers = batch // world * FEATURES
        cases.append((f"gather of {batch} x {FEATURES}", numbers, lambda x: gather(x.view(-1, FEATURES)), world - 1))
    for millions in (1, 5, 24):
        received = Exact(world, world).received
        cases.append((f"tree_sum of {millions} M", millions * 10**6, lambda x: tree_sum([x]), received))
    cases.append(("broadcast of 1 M (head)", FEATURES * DIM, lambda x: broadcast(x, 0), 1))
    sums = CLASSES * (1 + 2 * DIM)
    cases.append((f"all_sum of {CLASSES} classes", sums, lambda x: all_sum(x.double()), 2 * 2 * (world - 1) / world))
    for name, numbers, exchange, factor in cases:
        x = torch.ones(numbers)

        seconds = timed(partial(exchange, x), repeats, before=dist.barrier)
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

    from dml_core.data.loading import Views
    from dml_core.data.user_sets import load_folder

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as root:
        for number in range(32):
            noise = Image.fromarray(rng.integers(0, 255, (375, 500, 3), np.uint8)).filter(ImageFilter.GaussianBlur(1))
            path = Path(root, f"class {number % 2}", f"{number}.jpg")
            path.parent.mkdir(exist_ok=True)
            noise.save(path, quality=90)
        views = Views(load_folder(root).images, SIZE, "crop")
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
    return timed(step, repeats, time.process_time), min(grown(step) for _ in range(3))


def slowest(world: int) -> float:
    """Bytes/s of the slowest link between neighbours."""
    return NETWORK if world > MACHINE else NVLINK


def broadcast_seconds(size: float, world: int) -> float:
    """Of so many bytes, in pieces that follow each other down a tree of messages."""
    return size / slowest(world) + math.log2(world) * HOP if world > 1 else 0.0


class Exact:
    """How gradients of a size move by gradients=exact, as dml_core.gather.tree_sum sends them.

    Args:
        world: W.
        slices: S.
    """

    def __init__(self, world: int, slices: int):
        self.world, self.slices = world, slices
        self.doubles = is_power_of_two(world) and is_power_of_two(slices)
        pairs = [[(merge.source, merge.to) for merge in level] for level in tree(slices, world)]
        sent = [[(source, to) for source, to in level if source != to] for level in pairs]
        if self.doubles:
            sent = [[(r, r ^ (1 << level)) for r in range(world)] for level in range(world.bit_length() - 1)]
        self.rounds = [level for level in sent if level]

    @cached_property
    def messages(self) -> int:
        """From one rank to another, of all ranks, without the broadcast."""
        return sum(map(len, self.rounds))

    @cached_property
    def received(self) -> int:
        """Gradients that a rank receives at most, with the broadcast."""
        ends = [to for level in self.rounds for _, to in level]
        return max(ends.count(r) + (not self.doubles and r > 0) for r in range(self.world))

    @cached_property
    def sent(self) -> int:
        """Gradients that a rank sends at most; rank 0 sends one to the broadcast, and others pass it on."""
        starts = [source for level in self.rounds for source, _ in level]
        return max(starts.count(r) + (not self.doubles) for r in range(self.world))

    def seconds(self, size: float) -> float:
        """Each round takes as long as its slowest message."""
        total = 0.0 if self.doubles else broadcast_seconds(size, self.world)
        for level in self.rounds:
            within = all(source // MACHINE == to // MACHINE for source, to in level)
            total += size / (NVLINK if within else NETWORK) + HOP
        return total


def ring(size: float, world: int) -> float:
    """Seconds of an all-reduce of so many bytes in a ring: each rank sends 2 (W - 1) / W of them."""
    return 2 * (world - 1) / world * size / slowest(world) + 2 * (world - 1) * HOP


def two_trees(size: float, world: int) -> float:
    """Seconds of an all-reduce in NCCL's double binary trees: up and down, in pieces."""
    return 2 * size / slowest(world) + 2 * math.log2(world) * HOP


AllReduce = Callable[[float, int], float]


def left_over(size: float, world: int, all_reduce: AllReduce, backward: float) -> float:
    """Seconds that DistributedDataParallel needs after the backward pass, beside which its buckets are summed."""
    buckets = [min(size, FIRST_BUCKET)]
    while (rest := size - sum(buckets)) > 0.5:
        buckets.append(min(rest, BUCKET))
    ready = done = 0.0
    for bucket in buckets:
        ready += bucket / size * backward
        done = max(done, ready) + all_reduce(bucket, world)
    return done - backward


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print(f"| {' | '.join(head)} |")
    print("|---" * len(head) + "|")
    for cells in rows:
        print(f"| {' | '.join(cells)} |")


def counted(slices: int) -> None:
    """Messages of a step, for all numbers of workers that share so many slices."""
    rows = []
    for world in range(1, slices + 1):
        shares = [len(slices_of(r, world, slices)) for r in range(world)]
        held = " or ".join(map(str, sorted({*shares})))
        exact = Exact(world, slices)
        name = "none" if world == 1 else "doubling" if exact.doubles else "tree"
        sent = f"{exact.messages}" if exact.doubles else f"{exact.messages} + broadcast"
        faster = f"{slices / max(shares):.2g}"
        rows.append([f"{world}", held, faster, name, f"{len(exact.rounds)}", sent])
    table([f"workers ({slices} slices)", "slices of each", "speed-up, at most", "exchange", "rounds", "messages"], rows)


def exact_and_ddp(cases: Sequence[tuple[int, int]]) -> None:
    """What the gradients of backbone and head move for each (workers, slices), whatever the batch."""
    size, head = BACKBONE * 4, FEATURES * DIM * 4
    exacts = [Exact(*case) for case in cases]
    whole = [e.seconds(size) + broadcast_seconds(head, e.world) for e in exacts]
    rows = {
        "exact: exchange": ["doubling" if e.doubles else "tree, broadcast" for e in exacts],
        "exact: rounds, one after the other": [f"{len(e.rounds)}" for e in exacts],
        "exact: messages of all GPUs": [f"{e.messages:,}" for e in exacts],
        "exact: a GPU receives at most": [f"{(e.received * size + head) / 1e6:,.0f} MB" for e in exacts],
        "exact: a GPU sends at most": [f"{(e.sent * size + head) / 1e6:,.0f} MB" for e in exacts],
        "exact: after the backward pass": milliseconds(whole),
        "ddp, ring: a GPU receives and sends": [
            f"{2 * (e.world - 1) / e.world * (size + head) / 1e6:,.0f} MB" for e in exacts
        ],
    }
    print()
    table(["", *(f"{w} GPUs, {s} slices" for w, s in cases)], ([name, *cells] for name, cells in rows.items()))


def milliseconds(seconds: Iterable[float]) -> list[str]:
    return [f"{s * 1e3:,.1f} ms" for s in seconds]


ALL_REDUCES: dict[str, AllReduce] = {"ring": ring, "NCCL's trees": two_trees}


def overlapped(batches: Sequence[int], worlds: Sequence[int]) -> None:
    """Seconds of gradients=exact and of gradients=ddp, and from which size on which is faster."""
    size, head = BACKBONE * 4, FEATURES * DIM * 4
    cases = [(world, per_gpu, per_gpu / GPU_IMAGES * BACKWARD) for per_gpu in batches for world in worlds]
    titles = [f"{world} GPUs, b = {per_gpu}" for world, per_gpu, _ in cases]
    features = [4 * per_gpu * world * FEATURES for world, per_gpu, _ in cases]

    rows = {
        "backward pass": milliseconds(backward for *_, backward in cases),
        "exact, after it": milliseconds(
            Exact(world, world).seconds(size) + broadcast_seconds(head, world) for world, *_ in cases
        ),
    }
    for name, reduce in ALL_REDUCES.items():
        first = [reduce(moved, world) for moved, (world, *_) in zip(features, cases)]
        rows[f"ddp, {name}: features' gradient, before it"] = milliseconds(first)
        rest = [left_over(size + head, world, reduce, backward) for world, _, backward in cases]
        rows[f"ddp, {name}: left after it"] = milliseconds(rest)
        rows[f"ddp, {name}: both"] = milliseconds(map(sum, zip(first, rest)))
        rows[f"ddp, {name}: both, without overlap"] = milliseconds(
            f + reduce(size + head, world) for f, (world, *_) in zip(first, cases)
        )
    print()
    table(["", *titles], ([name, *cells] for name, cells in rows.items()))

    def crossover(reduce: AllReduce, moved: float, world: int, backward: float | None) -> str:
        """backward: of the ResNet-50; of other networks, in proportion to their parameters."""
        exact, first, found = Exact(world, world), reduce(moved, world), None
        for step in range(801):
            parameters = 10 ** (5 + step / 200)  # 1.2 % more each time
            size = 4 * parameters
            if backward is None:
                rest = reduce(size + head, world)
            else:
                rest = left_over(size + head, world, reduce, backward * parameters / BACKBONE)
            if first + rest >= exact.seconds(size) + broadcast_seconds(head, world):
                found = None
            elif found is None:
                found = parameters
        return "never" if found is None else f"{found / 1e6:.{0 if found > 1e7 else 1}f} M"

    rows = {}
    for name, reduce in ALL_REDUCES.items():
        for overlap in (False, True):
            rows[f"{name}, {'with' if overlap else 'without'} overlap"] = [
                crossover(reduce, moved, world, backward if overlap else None)
                for moved, (world, _, backward) in zip(features, cases)
            ]
    print()
    table(["ddp is faster from", *titles], ([name, *cells] for name, cells in rows.items()))


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
        return moved(size, size / slowest(world) + (world - 1) * HOP)

    def gradients(world: int) -> tuple[str, float]:
        exchange = Exact(world, world)
        return moved(exchange.received * BACKBONE * 4, exchange.seconds(BACKBONE * 4))

    def head(world: int) -> tuple[str, float]:
        return moved(FEATURES * DIM * 4, broadcast_seconds(FEATURES * DIM * 4, world))

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
        rate = slowest(world)
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
    parser.add_argument("--formulas", action="store_true", help="print what needs no measurement, in a second")
    options = parser.parse_args()
    torch.set_num_threads(1)
    counted(8)
    exact_and_ddp([(6, 8), (8, 8), (48, 64), (64, 64), (384, 512), (512, 512)])
    overlapped(options.per_gpu, (8, 64, 512))
    if options.formulas:
        return
    print(f"\n{usable_cpus()} cores, gloo over loopback; MB that a process receives, at most\n")
    print("| exchange | processes | MB | ms | GB/s |\n|---|---|---|---|---|")
    for world in (2, 3, 4):
        group(world, options.repeats)
    decode = decoding(options.repeats)
    print(f"\ndecoding and cropping a JPEG of 500 x 375 pixels to {SIZE}: {decode * 1e3:.1f} ms of a core\n")
    print("| global batch | head, synthesis, loss and gradients, ms of a core | memory, MB |\n|---|---|---|")
    grows: dict[int, int] = {}
    for batch in (128, 256, 512, 1024, 2048):
        seconds, grows[batch] = behind_the_backbone(batch, options.repeats)
        print(f"| {batch} | {seconds * 1e3:.0f} | {grows[batch] / 1e6:.0f} |", flush=True)
    # What grows with the square of the batch: f(8b) - 8 f(b) = 56 b^2 (1 + DRAWS) times what a pair takes.
    held = (grows[2048] - 8 * grows[256]) / (56 * 256**2 * (1 + DRAWS))
    print(f"\na pair of an embedding and another or a synthetic takes {held:.0f} bytes")
    for per_gpu in options.per_gpu:
        predicted(per_gpu, decode, held)
    besides()


if __name__ == "__main__":
    main()
