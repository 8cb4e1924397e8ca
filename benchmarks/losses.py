"""Time and memory of the loss terms, beside a loop written from the paper and the library's own route.

    python benchmarks/losses.py [--device cuda] [--threads 2] [--batch 128 1024] [--repeat 20] [--classes 20000]
                                [--only PATTERN]

Milliseconds of forward and backward, median (best) of the repeats; D = 512, K = 4 images a class, C = 100 classes or
B / 4, M = 3 draws, N = 5 intensities. Memory is what the peak of the process, or of the GPU, grew by, in units of the
input. `--classes 200000` shows the neighbor correction at that size. The first line tells how fast the machine is; the
last what a method's milliseconds are to be compared with: one step of a ResNet-50 on 128 pictures of 224 pixels, taken
as 16 times that on 8. Loops, and what the library lists, are left out where they would take minutes.
"""

import argparse
import ctypes
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torchvision
from pytorch_metric_learning import losses, miners
from torch import Tensor
from torch.nn.functional import normalize, relu

from dml_core import base_losses
from dml_core.ranking.clusters import cluster_ranking_loss
from dml_core.ranking.intensity import IntensityRanking
from dml_core.synthesis import gaussian
from dml_core.variation import ClassVariation, neighbor_correction

DIM, IMAGES, DRAWS, INTENSITIES = 512, 4, 3, 5
Step = Callable[[], Tensor | None]


def wait(device: str) -> None:
    """Wait until all work on the device is done."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def timed(step: Step, repeat: int, device: str = "cpu") -> str:
    """Median and best, in ms; slow steps are repeated less often."""
    times: list[float] = []
    while len(times) < repeat + 2 and sum(times) < 5:
        wait(device)
        start = time.perf_counter()
        loss = step()
        if loss is not None and loss.requires_grad:
            loss.backward()
        wait(device)
        times.append(time.perf_counter() - start)
    times = times[2:] or times  # without the first two, where there are more
    return f"{statistics.median(times) * 1e3:.1f} ({min(times) * 1e3:.1f})"


def grown(step: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that the peak of resident memory, or of a GPU's, lies above what was in use before."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    step()
    return status("VmHWM") - before


def correction(classes: int, device: str = "cpu") -> tuple[float, int, int]:
    """Correct the variances of classes of 1 to 59 images: seconds, bytes that memory grew by, bytes given."""
    torch.manual_seed(0)
    mean, variance = torch.randn(classes, DIM).to(device), torch.rand(classes, DIM).to(device)
    count = torch.randint(1, 60, (classes,)).to(device)
    neighbor_correction(mean[:100], variance[:100], count[:100])  # loads the device's libraries
    wait(device)
    start, seconds = time.perf_counter(), list[float]()

    def step() -> None:
        neighbor_correction(mean, variance, count)
        wait(device)
        seconds.append(time.perf_counter() - start)

    memory = grown(step, device)
    return seconds[0], memory, mean.nbytes + variance.nbytes


def status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def by_anchor(z: Tensor, labels: Tensor, synthetic: Tensor):
    """Anchor by anchor: cosines to its positives and to its negatives."""
    pool, everyone = normalize(torch.cat([z, synthetic])), labels.repeat(1 + len(synthetic) // len(z))
    for i in range(len(z)):
        cosine = pool @ pool[i]
        other = torch.arange(len(pool)) % len(z) != i
        yield cosine[(everyone == labels[i]) & other], cosine[everyone != labels[i]]


def loop_multi_similarity(z: Tensor, labels: Tensor, synthetic: Tensor) -> Tensor:
    total = torch.zeros(())
    for near, far in by_anchor(z, labels, synthetic):
        hard_near, hard_far = near[near - 0.1 < far.max()], far[far + 0.1 > near.min()]
        total = total + torch.log1p(torch.exp(-2 * (hard_near - 0.5)).sum()) / 2
        total = total + torch.log1p(torch.exp(40 * (hard_far - 0.5)).sum()) / 40
    return total / len(z)


def loop_contrastive(z: Tensor, labels: Tensor, synthetic: Tensor) -> Tensor:
    total = torch.zeros(())
    for near, far in by_anchor(z, labels, synthetic):
        total = total + relu(0.8 - near).sum() + relu(far - 0.5).sum()
    return total / len(z)


def loop_triplet(z: Tensor, labels: Tensor, synthetic: Tensor) -> Tensor:
    chosen = []
    for near, far in by_anchor(z, labels, synthetic):
        gap = (2 - 2 * far).sqrt() - (2 - 2 * near).sqrt()[:, None]
        chosen.append(0.2 - gap[(gap > 0) & (gap < 0.2)])
    return torch.cat(chosen).mean()


def loop_clusters(z: Tensor, s: Tensor, t: float = 3.0, alpha: float = 10.0) -> Tensor:
    with torch.no_grad():
        plain = torch.stack([(z - x).square().sum(1).sqrt() for x in z])
        centers = plain.mean(), torch.maximum(0.2 * plain.mean(), plain.mean() - t * plain.std())
    total = torch.zeros(())
    for i in range(len(z)):
        others = torch.cat([z[:i], z[i + 1 :]])
        distance = (s[i] * (z[i] - others).square()).sum(1).sqrt()
        gap = torch.stack([(distance - center).abs() for center in centers])
        total = total + (torch.softmax(-alpha * gap, 0) * gap).sum()
    return total / len(z) / (len(z) - 1)


def project(x: Tensor, projection: Tensor) -> Tensor:
    return relu(normalize(x @ projection.T, dim=-1))


def loop_intensity(z: Tensor, projection: Tensor) -> Tensor:
    total = torch.zeros(())
    for x in z:
        direction = normalize(torch.randn(INTENSITIES, DIM), dim=1)
        drawn = [x + 0.2 * (j + 1) * x.norm() * direction[j] for j in range(INTENSITIES)]
        similarity = [project(r, projection) @ project(x, projection) for r in drawn]
        inner = torch.zeros(())
        for j in range(INTENSITIES):
            for i in range(j):
                inner = inner + torch.exp(32 * (similarity[j] - similarity[i] + 0.11))
        total = total + torch.log1p(inner) / 32
    return total / len(z)


def loop_variation(z: Tensor, labels: Tensor, classes: int) -> None:
    onehot = torch.nn.functional.one_hot(labels, classes).float()[:, :, None]
    sorted_by_class = z[:, None] * onehot
    mean = sorted_by_class.sum(0) / onehot.sum(0)
    ((sorted_by_class - mean * onehot).square().sum(0) / onehot.sum(0)).sum()


def terms(batch: int, device: str = "cpu") -> dict[str, tuple[Step, Step | None, Step | None]]:
    """Name -> (ours, the loop, the library)."""
    with torch.device(device):
        steps = terms_on(batch, device)
    slow = batch > 1024 or device != "cpu"  # for a loop over the anchors
    return {name: (ours, None if slow else loop, library) for name, (ours, loop, library) in steps.items()}


def terms_on(batch: int, device: str) -> dict[str, tuple[Step, Step | None, Step | None]]:
    """`terms`, while new tensors are on the device."""
    torch.manual_seed(0)
    classes = max(100, batch // IMAGES)
    labels = torch.arange(batch) // IMAGES
    z = (torch.randn(classes, DIM)[labels] + 1.5 * torch.randn(batch, DIM)).requires_grad_()
    variance, s = torch.rand(classes, DIM), (torch.rand(batch, DIM) + 0.5).requires_grad_()
    projection = torch.nn.init.orthogonal_(torch.empty(DIM, DIM)).requires_grad_()
    generator = torch.Generator(device)
    synthetic = (z + torch.randn(DRAWS, batch, DIM)).flatten(0, 1).detach().requires_grad_()
    everyone = labels.repeat(1 + DRAWS)

    def ours(name: str) -> Step:
        loss = base_losses.build(name, classes, DIM).to(device)
        return lambda: loss(z, labels, synthetic)

    def library(loss, miner) -> Step:
        def step() -> Tensor:
            pool = torch.cat([z, synthetic])
            return loss(z, labels, miner and miner(z, labels, pool, everyone), pool, everyone)

        return step

    proxies = losses.ProxyAnchorLoss(classes, DIM)
    multi = base_losses.build("multi_similarity", classes, DIM)
    small = batch < 512  # the library's lists are short
    semihard = miners.TripletMarginMiner(type_of_triplets="semihard")

    def iaa() -> Tensor:
        drawn, _ = gaussian.synthesize(z, labels, variance, 0.7, DRAWS, generator)
        return multi(z, labels, drawn)

    intensity = IntensityRanking(DIM, 0.2, INTENSITIES, 0.11, None, 32.0, -1.0, 32.0, 0.1, False)

    def sgar() -> Tensor:
        rank, anchor, _ = intensity(z, labels, None, generator)
        return rank + anchor

    return {
        "boosted multi-similarity": (
            ours("multi_similarity"),
            lambda: loop_multi_similarity(z, labels, synthetic),
            library(losses.MultiSimilarityLoss(2, 40, 0.5), miners.MultiSimilarityMiner(0.1)),
        ),
        "boosted contrastive": (
            ours("contrastive"),
            lambda: loop_contrastive(z, labels, synthetic),
            library(losses.ContrastiveLoss(0.8, 0.5, distance=base_losses.distances.CosineSimilarity()), None),
        ),
        "boosted triplet": (
            ours("triplet"),
            lambda: loop_triplet(z, labels, synthetic),
            library(losses.TripletMarginLoss(0.2), semihard) if small else None,
        ),
        "boosted margin": (
            ours("margin"),
            None,
            library(losses.MarginLoss(learn_beta=True, num_classes=classes), miners.DistanceWeightedMiner())
            if small
            else None,
        ),
        "boosted proxy-anchor": (
            ours("proxy_anchor"),
            None,
            lambda: proxies(torch.cat([z, synthetic]), everyone),
        ),
        "IAA: synthesis + multi-similarity": (iaa, None, None),
        "SGAR: synthesis + both terms": (sgar, lambda: loop_intensity(z, projection), None),
        "NAMR: 2 clusters": (lambda: cluster_ranking_loss(z, s), lambda: loop_clusters(z, s), None),
        "NAMR: 3 clusters": (lambda: cluster_ranking_loss(z, s, 3), None, None),
    }


def row(name: str, *cells: object) -> None:
    print(f"| {name:<42} |" + "".join(f" {cell!s:>19} |" for cell in cells), flush=True)


def print_terms(device: str, batches: list[int], repeat: int, only: str = "") -> None:
    """Print a row for each loss term that has `only` in its name, at each batch size."""
    for batch in batches:
        for name, steps in terms(batch, device).items():
            if only in name:
                row(f"{name}, B={batch}", *(timed(step, repeat, device) if step else "" for step in steps))


def print_correction(device: str, sizes: list[int]) -> None:
    """Print time and memory of the neighbor correction of so many classes."""
    for classes in sizes:
        seconds, memory, given = correction(classes, device)
        row(f"correction of {classes} classes", f"{seconds * 1e3:.0f}", "", f"{memory / given:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="*", default=[128, 1024])
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--classes", type=int, nargs="*", default=[20_000])
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, repeat = options.device, options.repeat

    where = f"{options.threads} threads" if device == "cpu" else torch.cuda.get_device_name(device)
    row(f"{where}, ms", "ours", "loop", "library")
    row("-" * 42, *["-" * 19] * 3)
    square = torch.randn(2048, 2048, device=device)
    product = partial(torch.mm, square, square, out=torch.empty_like(square))
    row("a product of 2048 x 2048 (17.2 GFLOP)", timed(product, repeat, device), "", "")
    print_terms(device, options.batch, repeat, options.only)

    row("", "ours", "loop", "memory / input")
    for samples, classes in ((1000, 100), (8054, 98)):
        name = f"variation {samples} x {classes} x {DIM}"
        if options.only in name:
            z, labels = torch.randn(samples, DIM, device=device), torch.arange(samples, device=device) % classes
            update = ClassVariation(classes, DIM).to(device).update
            update(z, labels)
            memory = grown(partial(update, z, labels), device) / z.nbytes
            loop = timed(partial(loop_variation, z, labels, classes), 3, device) if samples < 5000 else ""
            row(name, timed(partial(update, z, labels), repeat, device), loop, f"{memory:.2f}")
    print_correction(device, [n for n in options.classes if options.only in f"correction of {n} classes"])
    if options.only in "ResNet-50":
        network, images = torchvision.models.resnet50().to(device), torch.randn(8, 3, 224, 224, device=device)
        row("ResNet-50 step, B=8 of 128", timed(lambda: network(images).sum(), 5, device), "", "")


if __name__ == "__main__":
    main()
