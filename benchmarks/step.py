"""One step of the optimizer: ours beside a plain PyTorch loop, and what waits for the device within it.

    python benchmarks/step.py [--backbone resnet50] [--size 224] [--batch 128] [--repeat 20] [--only PATTERN]

Milliseconds of a step, median of the repeats, images/s, the ratio to the plain loop, and on a GPU the peak of its
memory. The plain loop has the same network, optimizer and loss (multi-similarity, with the library's miner) with no
slices; on a GPU both are in bf16 with channels last. The second table has what lies behind the backbone, head, losses
and methods with their gradient, kernel by kernel and as one CUDA graph, and how often a step waits for the GPU. On a
machine without one, `--backbone small --size 32 --batch 32` shows that it runs.
"""

import argparse
import re
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from pytorch_metric_learning import losses, miners

from dml_core import backbones, heads
from dml_core.learner import Learner
from dml_core.passes import call
from pipelines.cluster.progress import Reporter
from pipelines.cluster.worker import Worker
from pipelines.config.recipe import load_recipe
from pipelines.config.schema import Config
from pipelines.data.sets import identify
from pipelines.data.sources import Sources
from pipelines.models.build import build_learner
from pipelines.training.optimizer import build_optimizer
from pipelines.training.passes import prepare_passes
from pipelines.training.setup import global_generators, replicate

CLASSES, DIM, IMAGES = 100, 512, 4
METHODS = ("iaa", "sgar", "namr")
LOSSES = ("multi_similarity", "contrastive", "triplet", "proxy_anchor", "margin")
Step = Callable[[], object]


class Built(NamedTuple):
    """A learner on its device, ready for steps."""

    config: Config
    learner: Learner
    noise: torch.Generator
    sources: Sources


class Measured:
    """The steps of one set of options.

    Args:
        options: Of the command.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bf16 = self.device.type == "cuda"
        self.cpus = torch.get_num_threads()
        size, batch = options.size, options.batch
        self.images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8).to(self.device)
        self.labels = (torch.arange(batch) // IMAGES % CLASSES).to(self.device)

    def plain(self, bf16: bool | None = None, compiled: bool = False) -> Step:
        """The loop that everybody writes."""
        torch.set_num_threads(self.cpus)
        backbone = backbones.build(self.options.backbone, "none").to(self.device)
        if self.device.type == "cuda":
            backbone.network.to(memory_format=torch.channels_last)
        head = heads.linear(backbone.dim, DIM).to(self.device)
        optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=1e-6)
        loss, miner = losses.MultiSimilarityLoss(2, 40, 0.5), miners.MultiSimilarityMiner(0.1)
        network = torch.compile(backbone, dynamic=False) if compiled else backbone
        enabled = self.bf16 if bf16 is None else bf16

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
                features = network(self.images)
            z = head(features.float())
            loss(z, self.labels, miner(z, self.labels)).backward()
            optimizer.step()

        return step

    def ours(self, methods: tuple[str, ...] = (), loss: str = "multi_similarity", **values: Any) -> Step:
        """The step of training/epoch.py, without data and without what is measured in it."""
        config, learner, noise, sources = self.build(methods, loss, values)
        optimizer = build_optimizer(config, learner)
        replica = replicate(learner, sources.autocast(), Worker(report=dict)) if config.gradients == "ddp" else None
        parameters = [p for p in learner.parameters() if p.requires_grad]

        def step() -> None:
            optimizer.zero_grad()
            given = self.images, self.labels, config.epochs - 1, noise, config.slices
            if replica is None:
                learner.backward(*given, sources.each)
            else:
                replica(*given).loss.backward()
            torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            optimizer.step()

        return step

    def behind(self, methods: tuple[str, ...], loss: str, recorded: bool) -> Step:
        """Head, loss and methods on features of a batch, with their gradient."""
        config, learner, noise, _ = self.build(methods, loss, {})
        features = torch.randn(len(self.labels), learner.backbone.dim, device=self.device)
        function = partial(learner.loss_and_gradient, epoch=config.epochs - 1, generator=noise)
        return partial(learner.run_loss if recorded else call, "", function, features, self.labels)

    def build(self, methods: tuple[str, ...], loss: str, values: dict[str, Any]) -> Built:
        """Build what training/setup.py builds."""
        config = self.config(methods, loss, values)
        learner = build_learner(config, CLASSES).to(self.device)
        # Exact slices go side by side on one thread each.
        torch.set_num_threads(self.cpus if config.gradients == "ddp" else 1)
        sources = Sources(config, learner, self.device, self.cpus, Reporter(None), identify(config.data))
        noise = torch.Generator(self.device)
        prepare_passes(learner, sources, [noise, *global_generators(self.device)])
        if learner.iaa is not None:
            z = torch.randn(3000, DIM, device=self.device)
            learner.iaa.estimate([(z, torch.arange(3000, device=self.device) % CLASSES)])
        return Built(config, learner, noise, sources)

    def config(self, methods: tuple[str, ...], loss: str, values: dict[str, Any]) -> Config:
        fixed: dict[str, Any] = {"workers": 1, "method": [*methods], "loss.name": loss, "embedding_dim": DIM}
        fixed |= {"backbone.name": self.options.backbone, "backbone.weights": "none", "optimizer.name": "adam"}
        fixed |= {"optimizer.lr": 1e-6, "batch.classes": self.options.batch // IMAGES, "batch.images": IMAGES}
        fixed |= {"precision": "bf16" if self.bf16 else "float32", "data.image_size": self.options.size}
        return load_recipe("glyphs", fixed | {key.replace("__", "."): value for key, value in values.items()})

    def milliseconds(self, step: Step) -> float:
        """Of a step, as the processor and the device take it together."""
        for _ in range(4):
            step()
        times = []
        while len(times) < self.options.repeat:
            self.synchronize()
            started = time.perf_counter()
            step()
            self.synchronize()
            times.append((time.perf_counter() - started) * 1e3)
        return statistics.median(times)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def waits(self, step: Step) -> int:
        """How often the processor waits for the device in a step."""
        step()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
        torch.cuda.set_sync_debug_mode("default")
        return len(caught)


def steps(measured: Measured) -> dict[str, Callable[[], Step]]:
    """Return what makes the step of each row."""
    rows: dict[str, Callable[[], Step]] = {"plain loop": measured.plain}
    rows["plain loop, compiled"] = lambda: measured.plain(compiled=True)
    for count in (1, 2, 4, 8):
        rows[f"exact, {count} slices"] = lambda count=count: measured.ours(batch__slices=count)
    for count in (1, 4):
        rows[f"exact, {count} slices, all methods"] = lambda count=count: measured.ours(METHODS, batch__slices=count)
    for method in METHODS:
        rows[f"exact, 4 slices, {method}"] = lambda method=method: measured.ours((method,), batch__slices=4)
    rows["exact, 4 slices, compiled"] = lambda: measured.ours(batch__slices=4, backbone__compile=True)
    rows["exact, 4 slices, all methods, compiled"] = lambda: measured.ours(
        METHODS, batch__slices=4, backbone__compile=True
    )
    rows["ddp"] = lambda: measured.ours(gradients="ddp")
    rows["ddp, all methods"] = lambda: measured.ours(METHODS, gradients="ddp")
    rows["ddp, compiled"] = lambda: measured.ours(gradients="ddp", backbone__compile=True)
    if measured.device.type == "cuda":
        rows["plain loop, float32"] = lambda: measured.plain(bf16=False)
        rows["exact, 4 slices, float32"] = lambda: measured.ours(batch__slices=4, precision="float32")
    return rows


def print_steps(measured: Measured, only: str = "") -> None:
    """Print a table of the rows that match a regular expression; the others are not measured."""
    print("| step | ms | images/s | of the plain loop | GiB |\n|---|---|---|---|---|")
    plain, on_gpu = None, measured.device.type == "cuda"
    for row, build in steps(measured).items():
        if not re.search(only, row):
            continue
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        milliseconds = measured.milliseconds(build())
        plain = milliseconds if row == "plain loop" else plain
        ratio = f"{plain / milliseconds:.2f}" if plain else ""
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if on_gpu else ""
        rate = measured.options.batch / milliseconds * 1e3
        print(f"| {row} | {milliseconds:.1f} | {rate:,.0f} | {ratio} | {memory} |", flush=True)


def print_behind(measured: Measured) -> None:
    """Print what lies behind the backbone, and on a GPU how often a step waits for it."""
    on_gpu = measured.device.type == "cuda"
    print("| loss | methods | kernel by kernel, ms | as a CUDA graph, ms | waits of a step |\n|---|---|---|---|---|")
    for loss in LOSSES:
        for methods in ((), METHODS):
            times = [f"{measured.milliseconds(measured.behind(methods, loss, False)):.2f}"]
            times += [f"{measured.milliseconds(measured.behind(methods, loss, True)):.2f}"] if on_gpu else [""]
            waits = measured.waits(measured.ours(methods, loss, batch__slices=4)) if on_gpu else ""
            print(f"| {loss} | {'+'.join(methods) or 'none'} | {' | '.join(times)} | {waits} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--only", default="", help="a regular expression of the rows to measure")
    measured = Measured(parser.parse_args())
    options, device = measured.options, measured.device
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {options.backbone}, {options.size} px, batch {options.batch}\n")

    print_steps(measured, options.only)
    print()
    print_behind(measured)


if __name__ == "__main__":
    main()
