"""Neither the gradient of a step nor a curve of losses depends on how many processes share the global batch."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from dml_core import backbones, base_losses, heads
from dml_core.gather import own_rows, rank, world_size
from dml_core.learner import Learner, Terms, Weights
from dml_core.passes import Passes
from dml_core.ranking.clusters import ClusterRanking
from dml_core.ranking.intensity import IntensityRanking
from dml_core.synthesis.gaussian import ClassAugmentation
from pipelines.cluster.worker import Worker
from pipelines.training import setup as training_setup
from tests import ranks

LOSSES = ("triplet", "contrastive", "multi_similarity", "margin", "proxy_anchor", "proxy_nca", "ArcFaceLoss")
METHODS = ((), ("iaa",), ("sgar",), ("namr",), ("iaa", "sgar", "namr"))
CLASSES, DIM, BATCH, SLICES = 6, 8, 16, 8
WORLDS = (2, 3, 4, 5)
EVERY_GRADIENT = (2, 3, 4)  # of these numbers of processes; of the others, curves alone
CASES = [
    (loss, methods, dtype, accumulate)
    for loss, methods, dtype in itertools.product(LOSSES, METHODS, (torch.float64, torch.float32))
    for accumulate in ((1, 2) if dtype == torch.float64 else (1,))
]


class TinyBackbone(backbones.Backbone):
    """Features that one linear layer can be wrong about."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 10), nn.Tanh()), 10, (0.5,) * 3, (0.3,) * 3)


def tiny_learner(loss: str, methods: tuple[str, ...]) -> Learner:
    torch.manual_seed(0)
    modules: dict[str, nn.Module] = {
        "iaa": ClassAugmentation(CLASSES, DIM, 2, 0.7, 3, 0, 1, 0.2, "diag", 2, 0.1, 0.1, 40.0),
        "sgar": IntensityRanking(DIM, 0.3, 4, 0.11, 0.2, 32.0, 0.05, 32.0, 0.1, False),
        "namr": ClusterRanking(heads.Structure(10, DIM), 3, 3.0, 10.0, "even"),
    }
    in_use = {method: modules[method] for method in methods}
    base_loss = base_losses.build(loss, CLASSES, DIM)
    return Learner(TinyBackbone(), heads.linear(10, DIM), base_loss, Weights(0.2, 0.2, 0.5), **in_use)  # type: ignore[arg-type]


def training_set() -> tuple[torch.Tensor, torch.Tensor]:
    """48 images, of which this rank's shard is every world_size()-th."""
    images = torch.randint(0, 256, (48, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(9))
    return images, torch.arange(48) % CLASSES


def estimate(learner: Learner) -> None:
    images, labels = training_set()
    with torch.no_grad():
        z = learner.eval().embed(images[rank() :: world_size()])
    learner.train()
    assert learner.iaa is not None
    learner.iaa.estimate([(z[:5], labels[rank() :: world_size()][:5]), (z[5:], labels[rank() :: world_size()][5:])])


def rows_of_rank(rows: torch.Tensor) -> torch.Tensor:
    """This rank's part of a global batch."""
    return own_rows(rows, SLICES)


def replicate(learner: Learner) -> nn.Module:
    """Wrap a learner in DistributedDataParallel, as setup.replicate does for a group without Ray."""
    return training_setup.replicate(learner, torch.autocast("cpu", enabled=False), Worker(report=dict))


def gradients_by_ddp(loss: str, methods: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Of one step in float64, as `gradients` has them."""
    learner = tiny_learner(loss, methods).double()
    images = torch.randint(0, 256, (1, BATCH, 3, 4, 4), dtype=torch.uint8)[0]
    labels = torch.arange(BATCH) // 4 % CLASSES
    if learner.iaa is not None:
        estimate(learner)
    replica = replicate(learner)
    for _ in range(2):  # the second time, DDP would complain of a parameter that had no gradient in the first
        torch.manual_seed(0)
        learner.zero_grad()
        noise = torch.Generator().manual_seed(0)
        replica(rows_of_rank(images), rows_of_rank(labels), 0, noise, SLICES).loss.backward()
    return {name: p.grad.clone() for name, p in learner.named_parameters()}


def gradients(loss: str, methods: tuple[str, ...], dtype: torch.dtype, accumulate: int) -> dict[str, torch.Tensor]:
    """Of one step over `accumulate` global batches, each sliced by rank."""
    learner = tiny_learner(loss, methods).to(dtype)
    images = torch.randint(0, 256, (accumulate, BATCH, 3, 4, 4), dtype=torch.uint8)
    labels = torch.arange(BATCH) // 4 % CLASSES
    if learner.iaa is not None:
        estimate(learner)
    for part in range(accumulate):
        torch.manual_seed(part)
        learner.backward(
            rows_of_rank(images[part]), rows_of_rank(labels), 0, torch.Generator().manual_seed(part), SLICES
        )
    return {name: p.grad.double() for name, p in learner.named_parameters()}


def loss_curve(methods: tuple[str, ...], ddp: bool = False) -> list[tuple[float, ...]]:
    """All terms of each step of two epochs in float64, the variation estimated before each."""
    learner = tiny_learner("multi_similarity", methods).double()
    replica = replicate(learner) if ddp else None
    images, labels = training_set()
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-2)
    curve = []
    for epoch in range(2):
        if learner.iaa is not None and learner.iaa.due(epoch):
            estimate(learner)
        for step, rows in enumerate(torch.randperm(48, generator=torch.Generator().manual_seed(epoch)).split(BATCH)):
            generator = torch.Generator().manual_seed(100 * epoch + step)
            optimizer.zero_grad()
            given = images[rows_of_rank(rows)], labels[rows_of_rank(rows)], epoch, generator, SLICES
            if replica is None:
                terms = learner.backward(*given)
            else:
                terms = replica(*given)
                terms.loss.backward()
            optimizer.step()
            curve.append(tuple(term.item() for term in terms))
    return curve


def trained() -> dict[str, torch.Tensor]:
    """Weights after 20 steps of AdamW in float32, and "losses", on the small network with all methods."""
    learner = tiny_learner("multi_similarity", METHODS[-1])
    learner.backbone = backbones.build("small", "none")
    learner.passes = Passes(learner.backbone)
    learner.head, learner.namr = heads.linear(128, DIM), ClusterRanking(heads.Structure(128, DIM), 3, 3.0, 10.0, "even")
    optimizer = torch.optim.AdamW(learner.parameters(), lr=3e-3)
    images = torch.randint(0, 256, (20, BATCH, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(BATCH) // 4 % CLASSES
    losses = []
    with ThreadPoolExecutor(2) as threads:  # one that the threads are not to be seen in
        for step in range(20):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            losses.append(
                learner.backward(
                    rows_of_rank(images[step]), rows_of_rank(labels), 0, generator, SLICES, threads.map
                ).loss
            )
            optimizer.step()
    return learner.state_dict() | {"losses": torch.stack(losses).detach()}


def everything() -> dict[object, object]:
    cases = CASES if world_size() in (1, *EVERY_GRADIENT) else []
    results: dict[object, object] = {case: gradients(*case) for case in cases}
    results |= {("curve", methods): loss_curve(methods) for methods in METHODS}
    if world_size() in (1, *EVERY_GRADIENT):
        results |= {("ddp", *case): gradients_by_ddp(*case) for case in itertools.product(LOSSES, METHODS)}
        results[("ddp", "curve")] = loss_curve(METHODS[-1], ddp=True)
    return results | {"trained": trained()}


def run_rank(folder: Path) -> None:
    torch.save(everything(), folder / f"{world_size()}_{rank()}.pt")


@pytest.fixture(scope="module")
def results_by_world(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    """World size -> the results of each rank."""
    folder = tmp_path_factory.mktemp("gradients")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results_by_world = {1: [everything()]}
    torch.set_num_threads(threads)
    for world in WORLDS:
        ranks.run(run_rank, world, folder)
        paths = [folder / f"{world}_{number}.pt" for number in range(world)]
        results_by_world[world] = [torch.load(path, weights_only=False) for path in paths]
    return results_by_world


@pytest.mark.parametrize("world", EVERY_GRADIENT)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join((c[0], *c[1], str(c[2])[6:], f"x{c[3]}")))
def test_gradient_equals_that_of_one_process(results_by_world: dict[int, list[dict]], world: int, case: tuple) -> None:
    tolerance = 1e-10 if case[2] == torch.float64 else 1e-5
    alone = results_by_world[1][0][case]
    scale = max(gradient.norm() for gradient in alone.values())
    assert scale > 0
    for result in results_by_world[world]:
        for name, gradient in result[case].items():
            # A gradient that is zero but for rounding (a bias that a loss ignores) has no relative error of its own.
            assert (gradient - alone[name]).norm() <= tolerance * max(alone[name].norm(), 1e-2 * scale), name


@pytest.mark.parametrize("world", (1, *EVERY_GRADIENT))
@pytest.mark.parametrize("methods", METHODS, ids="+".join)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_by_ddp_equals_the_exact_one(
    results_by_world: dict[int, list[dict]], world: int, loss: str, methods: tuple[str, ...]
) -> None:
    exact = results_by_world[1][0][(loss, methods, torch.float64, 1)]
    scale = max(gradient.norm() for gradient in exact.values())
    for result in results_by_world[world]:
        for name, gradient in result[("ddp", loss, methods)].items():
            assert (gradient - exact[name]).norm() <= 1e-6 * max(exact[name].norm(), 1e-2 * scale), name


@pytest.mark.parametrize("world", (1, *EVERY_GRADIENT))
def test_two_epochs_by_ddp_equal_the_exact_ones(results_by_world: dict[int, list[dict]], world: int) -> None:
    exact = torch.tensor(results_by_world[1][0][("curve", METHODS[-1])], dtype=torch.float64)
    for result in results_by_world[world]:
        curve = torch.tensor(result[("ddp", "curve")], dtype=torch.float64)
        torch.testing.assert_close(curve, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("methods", METHODS, ids="+".join)
def test_two_epochs_of_losses_equal_those_of_one_process(
    results_by_world: dict[int, list[dict]], world: int, methods: tuple[str, ...]
) -> None:
    alone = torch.tensor(results_by_world[1][0][("curve", methods)], dtype=torch.float64)
    in_use = {"sgar": ("sgar_rank", "sgar_anchor", "sgar_open"), "namr": ("namr_rank",)}
    for method, terms in in_use.items():
        for term in terms:
            assert alone[:, Terms._fields.index(term)].any() == (method in methods), term
    for result in results_by_world[world]:
        torch.testing.assert_close(
            torch.tensor(result[("curve", methods)], dtype=torch.float64), alone, rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("world", WORLDS)
def test_training_in_float32_is_bit_for_bit_that_of_one_process(
    results_by_world: dict[int, list[dict]], world: int
) -> None:
    alone = results_by_world[1][0]["trained"]
    assert len(alone["losses"].unique()) == 20 and alone["losses"].dtype == torch.float32
    for result in results_by_world[world]:
        for name, tensor in result["trained"].items():
            assert torch.equal(tensor, alone[name]), name


def test_learnable_losses_have_parameters(results_by_world: dict[int, list[dict]]) -> None:
    for loss in ("margin", "proxy_anchor", "proxy_nca", "ArcFaceLoss"):
        assert any(name.startswith("base_loss.") for name in results_by_world[1][0][(loss, (), torch.float64, 1)])
