"""Time of the exact retrieval metrics beside a bare matrix product and pytorch-metric-learning's AccuracyCalculator.

The calculator has two modes: R looks at as many neighbours as the largest class has (k="max_bin_count"), its fastest;
all, its default (k=None), ranks the whole set for every query and needs about 29 GB for 20,000 images, 7 GB for 10,000.

python benchmarks/retrieval.py [--size N] [--dim D] [--images PER_CLASS] [--repeats N] [--threads N] [--calculator MODE]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import faiss
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch.nn import functional as F

from dml_core.retrieval.metrics import retrieval_metrics
from dml_core.retrieval.neighbors import BLOCK

METRICS = ("precision_at_1", "mean_average_precision_at_r", "r_precision")


def embeddings(size: int, dim: int, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy class centres in a shuffled order: (size, dim) and labels (size,)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(size)[torch.randperm(size, generator=generator)] // images
    centers = torch.randn(int(labels.max()) + 1, dim, generator=generator)
    return F.normalize(centers[labels] + 3 * torch.randn(size, dim, generator=generator)), labels


def bare_product(z: torch.Tensor) -> None:
    """All similarities, in the blocks that are the fastest, thrown away."""
    product = torch.empty(BLOCK, len(z))
    for query in z.split(BLOCK):
        torch.mm(query, z.T, out=product[: len(query)])


def seconds(task: Callable[[], object]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("size", 20000), ("dim", 512), ("images", 10), ("repeats", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--calculator", choices=("R", "all", "none"), default="R")
    arguments = parser.parse_args()
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


if __name__ == "__main__":
    main()
