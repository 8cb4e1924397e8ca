"""CUDA graphs on a GPU: the bits of passes kernel by kernel, for any number of slices and of processes."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dml_core import backbones, base_losses, heads
from dml_core.gather import own_rows, rank, world_size
from dml_core.learner import Learner, Weights
from dml_core.passes import GraphRecorder, RecordedLoss, RecordedPasses
from dml_core.ranking.clusters import ClusterRanking
from dml_core.ranking.intensity import IntensityRanking
from tests import ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CLASSES, DIM, BATCH, SIZE, INFERENCE = 8, 32, 32, 64, 16
PRECISIONS = {"float32": False, "bf16": True}


def autocast(bf16: bool, cache_enabled: bool = True) -> torch.autocast:
    return torch.autocast("cuda", torch.bfloat16, enabled=bf16, cache_enabled=cache_enabled)


def learner_on_gpu() -> Learner:
    torch.manual_seed(0)
    loss = base_losses.build("multi_similarity", CLASSES, DIM)
    sgar = IntensityRanking(DIM, 0.3, 4, 0.11, 0.2, 32.0, 0.05, 32.0, 0.1, False)
    namr = ClusterRanking(heads.Structure(512, DIM), 3, 3.0, 10.0, "even")
    backbone = backbones.build("resnet18", "none")
    return Learner(backbone, heads.linear(512, DIM), loss, Weights(0.2, 0.2, 0.5), sgar=sgar, namr=namr).cuda()


def train(learner: Learner, slices: int, bf16: bool, noise: torch.Generator) -> list[Tensor]:
    """Weights, losses and features on the CPU."""
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-3)
    generator, losses = torch.Generator().manual_seed(1), []
    labels = torch.arange(BATCH, device="cuda") // 4
    for step in range(4):
        images = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator).cuda()
        noise.manual_seed(step)
        optimizer.zero_grad()
        given = own_rows(images, slices), own_rows(labels, slices), 0, noise, slices
        terms = learner.backward(*given, lambda function, *rows: map(autocast(bf16)(function), *rows))
        losses.append(terms.loss.detach())
        optimizer.step()
        with torch.inference_mode(), autocast(bf16):
            features = learner.features(images[:INFERENCE]).float().clone()
    return [tensor.cpu() for tensor in (*learner.state_dict().values(), torch.stack(losses), features)]


def record(learner: Learner, bf16: bool, said: list[str], noise: torch.Generator) -> None:
    def in_precision(cache_enabled: bool = True) -> torch.autocast:
        return autocast(bf16, cache_enabled)

    parameters, _ = learner.trained
    learner.passes = RecordedPasses(
        learner.backbone, None, INFERENCE, in_precision, parameters, said.append, GraphRecorder()
    )
    learner.run_loss = RecordedLoss([noise], [*learner.buffers()], said.append, GraphRecorder([noise]))


@pytest.mark.parametrize(("slices", "precision"), [*itertools.product((1, 2, 4, 8), PRECISIONS)])
def test_graphs_give_the_bits_of_kernels(slices: int, precision: str) -> None:
    bf16, said = PRECISIONS[precision], list[str]()
    eager = learner_on_gpu()
    graphs = copy.deepcopy(eager)
    noise = torch.Generator("cuda")
    record(graphs, bf16, said, noise)
    expected = train(eager, slices, bf16, noise)
    for one, other in zip(train(graphs, slices, bf16, noise), expected, strict=True):
        assert torch.equal(one, other)
    assert not said and isinstance(graphs.passes, RecordedPasses) and graphs.passes.inference is not None
    assert isinstance(graphs.run_loss, RecordedLoss) and graphs.run_loss.recorded is not None


def test_features_of_bf16_and_their_gradient_are_near_those_of_float32() -> None:
    learner, gradients, losses = learner_on_gpu(), list[Tensor](), list[float]()
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    for precision in PRECISIONS.values():
        learner.zero_grad()
        noise, labels = torch.Generator("cuda").manual_seed(0), torch.arange(BATCH, device="cuda") // 4
        each = partial(in_each, autocast(precision))
        losses.append(float(learner.backward(images.cuda(), labels, 0, noise, 4, each).loss))
        gradients.append(torch.cat([p.grad.flatten() for p in learner.parameters() if p.grad is not None]))
    exact, rounded = gradients
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert (rounded - exact).norm() < 0.3 * exact.norm()  # 0.2 on a processor: the miner takes some other pairs


def in_each(context: torch.autocast, function: Callable[..., object], *rows: Iterable[Tensor]) -> Iterator[object]:
    return map(context(function), *rows)


def test_a_network_that_waits_for_the_device_runs_on() -> None:
    class Waits(torch.nn.Module):
        def __init__(self, network: torch.nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x * float(x.abs().max() > -1))

    said: list[str] = []
    learners = learner_on_gpu(), learner_on_gpu()
    for learner in learners:
        learner.backbone.network = Waits(learner.backbone.network)
    noise = torch.Generator("cuda")
    record(learners[1], False, said, noise)
    expected, weights = (train(learner, 4, False, noise) for learner in learners)
    for one, other in zip(weights, expected, strict=True):
        assert torch.equal(one, other)
    assert len(said) == 1 and "cannot be a CUDA graph" in said[0]


def run_rank(folder: Path) -> None:
    said: list[str] = []
    learner = learner_on_gpu()
    noise = torch.Generator("cuda")
    record(learner, True, said, noise)
    tensors = train(learner, 4, True, noise)
    assert not said
    torch.save(tensors, folder / f"{world_size()}_{rank()}.pt")


def test_two_processes_on_one_gpu_give_the_bits_of_one(tmp_path: Path) -> None:
    """Over gloo, which takes tensors of the GPU."""
    for world in (1, 2):
        ranks.run(run_rank, world, tmp_path)
    alone = torch.load(tmp_path / "1_0.pt")
    for number in range(2):
        for one, other in zip(torch.load(tmp_path / f"2_{number}.pt"), alone, strict=True):
            assert torch.equal(one, other)
