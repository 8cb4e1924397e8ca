"""Neither the gradient of a step nor a curve of losses depends on how many processes share the global batch."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dml_core import backbones, base_losses, heads
from dml_core.gather import gather, rank, world_size
from dml_core.learner import Learner, Terms, Weights
from dml_core.ranking.clusters import ClusterRanking
from dml_core.ranking.intensity import IntensityRanking
from dml_core.synthesis.gaussian import ClassAugmentation

LOSSES = ("triplet", "contrastive", "multi_similarity", "margin", "proxy_anchor", "proxy_nca", "ArcFaceLoss")
METHODS = ((), ("iaa",), ("sgar",), ("namr",), ("iaa", "sgar", "namr"))
CLASSES, DIM, BATCH = 6, 8, 16
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
    made: dict[str, nn.Module] = {
        "iaa": ClassAugmentation(CLASSES, DIM, 2, 0.7, 3, 0, 1, 0.2, "diag", 2, 0.1, 0.1, 40.0),
        "sgar": IntensityRanking(DIM, 0.3, 4, 0.11, 0.2, 32.0, 0.05, 32.0, 0.1, False),
        "namr": ClusterRanking(heads.Structure(10, DIM), 3, 3.0, 10.0, "even"),
    }
    used = {method: made[method] for method in methods}
    base_loss = base_losses.build(loss, CLASSES, DIM)
    return Learner(TinyBackbone(), heads.linear(10, DIM), base_loss, Weights(0.2, 0.2, 0.5), **used)  # type: ignore[arg-type]


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


def parallel_and_rows(learner: Learner) -> tuple[nn.Module, slice]:
    parallel = DistributedDataParallel(learner, broadcast_buffers=False) if world_size() > 1 else learner
    return parallel, slice(rank() * BATCH // world_size(), (rank() + 1) * BATCH // world_size())


def gradients(loss: str, methods: tuple[str, ...], dtype: torch.dtype, accumulate: int) -> dict[str, torch.Tensor]:
    """Of one step over `accumulate` global batches, each sliced by rank."""
    learner = tiny_learner(loss, methods).to(dtype)
    images = torch.randint(0, 256, (accumulate, BATCH, 3, 4, 4), dtype=torch.uint8)
    labels = torch.arange(BATCH) // 4 % CLASSES
    if learner.iaa is not None:
        estimate(learner)
    parallel, mine = parallel_and_rows(learner)
    for part in range(accumulate):
        torch.manual_seed(part)
        last = part + 1 == accumulate
        waiting = parallel.no_sync() if world_size() > 1 and not last else torch.enable_grad()
        with waiting:
            generator = torch.Generator().manual_seed(part)
            parallel(images[part, mine], labels[mine], 0, generator).loss.backward()
    return {name: p.grad.double() for name, p in learner.named_parameters()}


def loss_curve(methods: tuple[str, ...]) -> list[tuple[float, ...]]:
    """All terms of each step of two epochs in float64, the variation estimated before each."""
    learner = tiny_learner("multi_similarity", methods).double()
    images, labels = training_set()
    parallel, mine = parallel_and_rows(learner)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-2)
    curve = []
    for epoch in range(2):
        if learner.iaa is not None and learner.iaa.due(epoch):
            estimate(learner)
        for step, rows in enumerate(torch.randperm(48, generator=torch.Generator().manual_seed(epoch)).split(BATCH)):
            generator = torch.Generator().manual_seed(100 * epoch + step)
            terms = parallel(images[rows[mine]], labels[rows[mine]], epoch, generator)
            optimizer.zero_grad()
            terms.loss.backward()
            optimizer.step()
            curve.append(tuple(term.item() for term in terms))
    return curve


def gather_is_adjoint() -> torch.Tensor:
    """Largest error of <gather(x), y> = sum over ranks of <x, gather*(y)>, each rank with a y of its own."""
    torch.manual_seed(rank())
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    everything = gather(x)
    y = torch.randn(everything.shape, dtype=torch.float64)
    (everything * y).sum().backward()
    both = torch.stack([(everything.detach() * y).sum(), (x.detach() * x.grad).sum()])
    if world_size() > 1:
        dist.all_reduce(both)
    return (both[0] - both[1]).abs()


def first_losses() -> list[float]:
    """Of five steps of Adam in float32 on the small network, as a recipe begins: with a warm-up."""
    torch.manual_seed(0)
    sgar = IntensityRanking(DIM, 0.1, 5, 0.11, None, 32.0, 0.05, 32.0, 0.1, False)
    backbone = backbones.build("small", "none")
    loss = base_losses.build("multi_similarity", CLASSES, DIM)
    learner = Learner(backbone, heads.linear(backbone.dim, DIM), loss, Weights(0.2, 0.2), sgar=sgar)
    parallel, mine = parallel_and_rows(learner)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-4)
    images = torch.randint(0, 256, (5, BATCH, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(BATCH) // 4 % CLASSES
    losses = []
    for step in range(5):
        terms = parallel(images[step, mine], labels[mine], 0, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        losses.append(terms.loss.item())
    return losses


def everything() -> dict[object, object]:
    found: dict[object, object] = {case: gradients(*case) for case in CASES}
    found |= {("curve", methods): loss_curve(methods) for methods in METHODS}
    return found | {"adjoint": gather_is_adjoint(), "losses": first_losses()}


def run_rank(number: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=number, world_size=world)
    torch.save(everything(), f"{folder}/gradients{world}_{number}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    """World size -> what each rank found."""
    folder = tmp_path_factory.mktemp("gradients")
    found = {1: [everything()]}
    for world in (2, 4):
        mp.spawn(run_rank, (world, str(folder)), nprocs=world)
        paths = [folder / f"gradients{world}_{number}.pt" for number in range(world)]
        found[world] = [torch.load(path, weights_only=False) for path in paths]
    return found


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join((c[0], *c[1], str(c[2])[6:], f"x{c[3]}")))
def test_gradient_equals_that_of_one_process(found: dict[int, list[dict]], world: int, case: tuple) -> None:
    tolerance = 1e-10 if case[2] == torch.float64 else 1e-5
    alone = found[1][0][case]
    scale = max(gradient.norm() for gradient in alone.values())
    assert scale > 0
    for of_rank in found[world]:
        for name, gradient in of_rank[case].items():
            # A gradient that is zero but for rounding (a bias that a loss ignores) has no relative error of its own.
            assert (gradient - alone[name]).norm() <= tolerance * max(alone[name].norm(), 1e-2 * scale), name


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("methods", METHODS, ids="+".join)
def test_two_epochs_of_losses_equal_those_of_one_process(
    found: dict[int, list[dict]], world: int, methods: tuple[str, ...]
) -> None:
    alone = torch.tensor(found[1][0][("curve", methods)], dtype=torch.float64)
    in_use = {"sgar": ("sgar_rank", "sgar_anchor", "sgar_open"), "namr": ("namr_rank",)}
    for method, terms in in_use.items():
        for term in terms:
            assert alone[:, Terms._fields.index(term)].any() == (method in methods), term
    for of_rank in found[world]:
        torch.testing.assert_close(
            torch.tensor(of_rank[("curve", methods)], dtype=torch.float64), alone, rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("world", [1, 2, 4])
def test_gather_backward_is_its_adjoint(found: dict[int, list[dict]], world: int) -> None:
    assert all(of_rank["adjoint"] < 1e-12 for of_rank in found[world])


@pytest.mark.parametrize("world", [2, 4])
def test_first_steps_agree_in_float32(found: dict[int, list[dict]], world: int) -> None:
    alone = found[1][0]["losses"]
    assert len(set(alone)) == 5
    for of_rank in found[world]:
        assert of_rank["losses"] == pytest.approx(alone, rel=1e-5)


def test_learnable_losses_have_parameters(found: dict[int, list[dict]]) -> None:
    for loss in ("margin", "proxy_anchor", "proxy_nca", "ArcFaceLoss"):
        assert any(name.startswith("base_loss.") for name in found[1][0][(loss, (), torch.float64, 1)])
