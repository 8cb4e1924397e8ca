"""Time of the exact retrieval metrics beside a bare matrix product and pytorch-metric-learning's AccuracyCalculator.

The calculator has two modes: R looks at as many neighbours as the largest class has (k="max_bin_count"), its fastest;
all, its default (k=None), ranks the whole set for every query and needs about 29 GB for 20,000 images, 7 GB for 10,000.

python benchmarks/retrieval.py [--size N] [--dim D] [--images PER_CLASS] [--repeats N] [--threads N] [--calculator MODE]
python benchmarks/retrieval.py --device cuda [--size N] [--dim D] [--images PER_CLASS] [--repeats N]
python benchmarks/retrieval.py --processes P [--size N] [--dim D] [--images PER_CLASS] [--sample S] --calculator none

With --device cuda, both run on the GPU, and the most memory that the search takes, the embeddings included, is printed.

With --processes a group of P processes (gloo, a thread each) holds the set in shards, as the workers of a training do,
and each makes its own rows only. The bare product runs in the same processes in the middle of the search: after one
gallery block in S (default: as many as keep it to some 16) each multiplies its own queries by that block, in the tiles
that are the fastest, and throws the result away; its time is counted apart and scaled to all blocks: the product of
all by all, of which the search needs only half (dml_core/retrieval/mutual.py). CPU: seconds of all processes, to be
looked at where others use the machine. Memory is summed over all processes: VmHWM counts a page that two of them share
twice; PSS counts it once and is looked at twice a second. Before that the metrics of a small set are compared, bit for
bit, with those of one process.
"""

import argparse
import os
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from dml_core.gather import all_sum, broadcast_object, gather
from dml_core.retrieval import neighbors
from dml_core.retrieval.metrics import retrieval_metrics, sharded_retrieval_metrics
from dml_core.retrieval.neighbors import BLOCK, GALLERY_BLOCK, block_rows, owned_rows

METRICS = ("precision_at_1", "mean_average_precision_at_r", "r_precision")
TILE = 1024  # rows and columns of the product that is the fastest of 256, 1024, 4096 by 1024, 4096, 16384
GPU_TILE = (4096, 65_536)  # rows and columns of the product on a GPU
CHECKED = 20_000  # embeddings that are also searched by one process


def embeddings(size: int, dim: int, images: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy class centres in a shuffled order: (size, dim) and labels (size,)."""
    generator = torch.Generator(device).manual_seed(0)
    labels = torch.randperm(size, generator=generator, device=device) // images
    centers = torch.randn(int(labels.max()) + 1, dim, generator=generator, device=device)
    noise = torch.randn(size, dim, generator=generator, device=device)
    return F.normalize(noise.mul_(3).add_(centers[labels])), labels


def bare_product(z: torch.Tensor) -> None:
    """All similarities, in the blocks that are the fastest, thrown away."""
    rows, columns = (BLOCK, len(z)) if z.device.type == "cpu" else GPU_TILE
    product = z.new_empty(rows * min(columns, len(z)))
    for query in z.split(rows):
        for gallery in z.split(columns):
            tile = product[: len(query) * len(gallery)].view(len(query), len(gallery))
            torch.mm(query, gallery.T, out=tile)


class SearchTime(NamedTuple):
    """What the metrics of a set take, and its bare product: the median of some runs, taken in turn.

    Attributes:
        metrics, product: Seconds.
        ratio: Of the metrics' seconds to the product's.
        gib: Most memory of the GPU while the metrics were computed, with the embeddings; 0 on a processor.
        map_at_r: Of the set.
    """

    metrics: float
    product: float
    ratio: float
    gib: float
    map_at_r: float


def measure_search(size: int, dim: int, images: int, device: str, repeats: int) -> SearchTime:
    """Measure the exact metrics within a set of clustered float32 embeddings (size, dim), `images` a class."""
    z, labels = embeddings(size, dim, images, device)
    for warm_up in (z[:5000], z[: GPU_TILE[0]]):  # libraries are loaded, and memory is there
        retrieval_metrics(warm_up, labels[: len(warm_up)])
        bare_product(warm_up)
    products, searches, metrics, peak = [], [], dict[str, float](), 0
    for _ in range(repeats):
        products.append(seconds(lambda: bare_product(z)))
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        searches.append(seconds(lambda: metrics.update(retrieval_metrics(z, labels))))
        peak = 0 if device == "cpu" else max(peak, torch.cuda.max_memory_allocated())
    search, product = statistics.median(searches), statistics.median(products)
    return SearchTime(search, product, search / product, peak / 2**30, metrics["map_at_r"])


class Spent(NamedTuple):
    """Seconds by the clock, and of CPU: other work on the machine lengthens the first."""

    clock: float
    cpu: float

    def plus(self, after: "Spent", before: "Spent") -> "Spent":
        return Spent(*(a + b - c for a, b, c in zip(self, after, before, strict=True)))


def spent() -> Spent:
    """So far, by this process."""
    return Spent(time.perf_counter(), time.process_time())


def seconds(task: Callable[[], object]) -> float:
    """By the clock, with what a GPU still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    task()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def shard(size: int, dim: int, images: int, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows (n, dim) of a set like that of `embeddings` that `rank` holds, and all labels (size,): the same set for
    any world, as each block has a generator of its own."""
    labels = torch.randperm(size, generator=torch.Generator().manual_seed(0)).floor_divide_(images)
    centers = torch.randn(int(labels.max()) + 1, dim, generator=torch.Generator().manual_seed(1))
    own = owned_rows(size, rank, world)
    z = torch.empty(len(own), dim)
    for part, rows in zip(z.split(block_rows(size)), own.split(block_rows(size)), strict=True):
        part.normal_(0, 1, generator=torch.Generator().manual_seed(2 + int(rows[0])))
        part += centers[labels[rows]]
    return z, labels


class Sample:
    """The bare product, in the middle of the search: of this process's queries and one gallery block in `every`."""

    def __init__(self, queries: torch.Tensor, every: int):
        self.queries, self.every, self.seen, self.rows = queries, every, 0, 0
        self.spent = Spent(0.0, 0.0)
        self.product = torch.empty(TILE, TILE)
        self.blocks, neighbors.gallery_blocks = neighbors.gallery_blocks, self.interrupted

    def interrupted(self, *arguments: object) -> Iterator[tuple[int, torch.Tensor]]:
        for offset, block in self.blocks(*arguments):  # type: ignore[arg-type]
            yield offset, block
            if self.seen % self.every == self.every // 2:  # spread, and not the first of all
                before = spent()
                self.multiply(block)
                self.spent = self.spent.plus(spent(), before)
                self.rows += len(block)
            self.seen += 1

    def multiply(self, block: torch.Tensor) -> None:
        for query in self.queries.split(TILE):
            for tile in block.split(TILE):
                torch.mm(query, tile.T, out=self.product[: len(query), : len(tile)])

    def end(self) -> None:
        neighbors.gallery_blocks = self.blocks


class Memory:
    """Most memory of some processes, in bytes, looked at twice a second by a thread of one of them."""

    def __init__(self, processes: list[int]):
        self.processes, self.peak, self.ended = processes, 0, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def look(self) -> int:
        return sum(proc(f"{one}/smaps_rollup", "Pss") for one in self.processes)

    def watch(self) -> None:
        while not self.ended.wait(0.5):
            self.peak = max(self.peak, self.look())

    def end(self) -> int:
        self.ended.set()
        self.thread.join()
        return self.peak


def proc(path: str, key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc", path).read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


class Task(NamedTuple):
    size: int
    dim: int
    images: int
    sample: int | None


def in_group(rank: int, world: int, store: str, task: Task) -> None:
    """One process of the group."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    processes = gather(torch.tensor([os.getpid()])).tolist()
    memory = Memory(processes) if rank == 0 else None
    dist.barrier()
    libraries = memory.look() if memory else 0
    check(rank, world, task)

    z, labels = shard(task.size, task.dim, task.images, rank, world)
    blocks = -(-task.size // GALLERY_BLOCK)
    sample = Sample(z, min(blocks, task.sample or max(1, blocks // 16)))
    dist.barrier()
    started = spent()
    metrics = sharded_retrieval_metrics(z, labels)
    took = Spent(0.0, 0.0).plus(spent(), started)
    sample.end()
    # Of all processes: by the clock what the slowest took, without the samples, and the product's mean; CPUs of all.
    mine = [[t - s, s * task.size / sample.rows] for t, s in zip(took, sample.spent, strict=True)]
    found = gather(torch.tensor(mine, dtype=torch.float64).view(1, 2, 2))
    most = all_sum(torch.tensor([float(proc("self/status", "VmHWM"))])).item()
    if rank == 0:
        assert memory is not None
        pss, gib = memory.end(), 2**30
        search, bare = found[:, 0, 0].max().item(), found[:, 0, 1].mean().item()
        search_cpu, bare_cpu = found[:, 1].sum(0).tolist()
        share = "all blocks" if sample.rows == task.size else f"{sample.rows / task.size:.1%} of the gallery's blocks"
        rate = 2 * task.size**2 * task.dim / bare / 1e9
        print(f"{task.size:,} x {task.dim}, {task.images} a class, {world} processes of a thread each")
        told = f"{rate:.0f} GFLOP/s in all, measured on {share}; CPU {bare_cpu:.1f} s"
        print(f"matrix product     {bare:9.1f} s   {told}")
        times = f"{search / bare:.2f} x matrix product; CPU {search_cpu:.1f} s, {search_cpu / bare_cpu:.2f} x"
        print(f"sharded metrics    {search:9.1f} s   {times}")
        memories = f"{pss / gib:9.2f} GiB PSS ({libraries / gib:.2f} before the set), {most / gib:.2f} GiB VmHWM"
        print(f"peak memory        {memories}")
        print(
            "  ".join(f"{name} {metrics[name]:.4f}" for name in ("recall_at_1", "map_at_r", "r_precision")), flush=True
        )
    dist.destroy_process_group()


def check(rank: int, world: int, task: Task) -> None:
    """Of a small set: the metrics of the group are those of one process."""
    size = min(CHECKED, task.size)
    sharded = sharded_retrieval_metrics(*shard(size, task.dim, task.images, rank, world))
    if rank == 0:
        alone = retrieval_metrics(*shard(size, task.dim, task.images, 0, 1))
        assert sharded == alone, f"{sharded} in {world} processes, {alone} in one"
        print(f"{size:,} x {task.dim}: {world} processes and one agree to the last bit")
    assert broadcast_object(sharded) == sharded


def by_processes(world: int, task: Task) -> None:
    """In `world` processes, this one among them, so that none is there only to wait."""
    with tempfile.TemporaryDirectory() as folder:
        given = world, f"file://{folder}/store", task
        others = [mp.get_context("fork").Process(target=in_group, args=(rank, *given)) for rank in range(1, world)]
        for other in others:
            other.start()
        in_group(0, *given)
        for other in others:
            other.join()


def by_threads(arguments: argparse.Namespace) -> None:
    import faiss
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    z, labels = embeddings(arguments.size, arguments.dim, arguments.images)
    k = "max_bin_count" if arguments.calculator == "R" else None
    calculator = AccuracyCalculator(include=METRICS, k=k, device=torch.device("cpu"))
    tasks: dict[str, Callable[[], object]] = {
        "matrix product": lambda: bare_product(z),
        "retrieval_metrics": lambda: retrieval_metrics(z, labels),
    }
    if arguments.calculator != "none":
        tasks["AccuracyCalculator"] = lambda: calculator.get_accuracy(z, labels)
    # Interleaved, so that other load on the machine falls on all of them alike.
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(arguments.repeats):
        for name, task in tasks.items():
            times[name].append(seconds(task))
    ours = statistics.median(times["retrieval_metrics"])
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:20s} {median:8.2f} s   {median / ours:5.2f} x retrieval_metrics   (least {min(values):.2f} s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("size", 20000), ("dim", 512), ("images", 10), ("repeats", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--calculator", choices=("R", "all", "none"), default="R")
    parser.add_argument("--processes", type=int, default=None)
    parser.add_argument("--sample", type=int, default=None)
    arguments = parser.parse_args()
    if arguments.device != "cpu":
        if arguments.processes:
            parser.error("--device cuda needs no --processes: they are CPUs'")
        given = arguments.size, arguments.dim, arguments.images
        time_of = measure_search(*given, arguments.device, arguments.repeats)
        print(f"{given[0]:,} x {given[1]}, {given[2]} a class, on {torch.cuda.get_device_name()}")
        print(f"matrix product     {time_of.product:9.3f} s")
        print(f"retrieval_metrics  {time_of.metrics:9.3f} s   {time_of.ratio:.2f} x matrix product")
        print(f"peak memory        {time_of.gib:9.2f} GiB   map_at_r {time_of.map_at_r:.4f}")
    elif arguments.processes is None:
        by_threads(arguments)
    elif arguments.calculator != "none":
        parser.error("--processes needs --calculator none: AccuracyCalculator knows no shards")
    else:
        by_processes(arguments.processes, Task(arguments.size, arguments.dim, arguments.images, arguments.sample))


if __name__ == "__main__":
    main()
