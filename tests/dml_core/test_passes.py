"""Recorded passes beside those kernel by kernel. Here a replay calls what was recorded once more (passes.rerun)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dml_core import backbones, base_losses, heads
from dml_core.learner import Learner, Weights
from dml_core.passes import Passes, RecordedLoss, RecordedPasses, Recording, rerun
from dml_core.ranking.clusters import ClusterRanking
from dml_core.ranking.intensity import IntensityRanking
from dml_core.synthesis.gaussian import ClassAugmentation

CLASSES, DIM, SLICES, STEPS, BATCH = 4, 8, 4, 3, 5


def no_autocast(cache_enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", enabled=False, cache_enabled=cache_enabled)


def small_learner() -> Learner:
    torch.manual_seed(0)
    loss = base_losses.build("multi_similarity", CLASSES, DIM)
    return Learner(backbones.build("small", "none"), heads.linear(128, DIM), loss, Weights())


def images(seed: int, count: int = 8) -> Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def recorded(
    learner: Learner, record: Callable[..., Recording] = rerun, tell: Callable[[str], None] = print
) -> Learner:
    parameters, _ = learner.trained
    learner.passes = RecordedPasses(learner.backbone, None, BATCH, no_autocast, parameters, tell, record)
    return learner


def train(learner: Learner, slices: int = SLICES) -> list[Tensor]:
    """Weights, losses and features after some steps, each of two global batches whose gradients are added up."""
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(2):
            labels, noise = torch.arange(8) // 2, torch.Generator()
            losses.append(learner.backward(images(2 * step + part), labels, 0, noise, slices).loss.detach())
        optimizer.step()
        with torch.inference_mode():  # as validation does between steps
            features = [
                learner.features(images(seed, count)).clone() for seed, count in ((7, BATCH), (8, BATCH), (9, 2))
            ]
    return [*learner.state_dict().values(), torch.stack(losses), *features]


def assert_same_bits(one: list[Tensor], other: list[Tensor]) -> None:
    for left, right in zip(one, other, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("slices", [1, SLICES])
def test_replays_are_what_kernels_are(slices: int) -> None:
    learner = recorded(small_learner())
    assert_same_bits(train(learner, slices), train(small_learner(), slices))
    assert isinstance(learner.passes, RecordedPasses)
    assert len(learner.passes.slices) == slices and learner.passes.inference is not None


def test_slices_go_forward_in_order_and_back_in_reverse() -> None:
    """Graphs share memory: a pass may overwrite what was needed by passes that were recorded before it."""
    order: list[int] = []

    def record(function: Callable[[], Tensor]) -> Recording:
        recording, number = rerun(function), len(order)
        order.append(number)
        return Recording(lambda: (order.append(number), recording.replay()), recording.output)

    learner = recorded(small_learner(), record)
    for step in range(2):
        learner.backward(images(step), torch.arange(8) // 2, 0, torch.Generator(), SLICES)
    assert order == [*range(2 * SLICES)] * 3


def test_a_network_that_cannot_be_recorded_says_so_once_and_runs_on(caplog: pytest.LogCaptureFixture) -> None:
    lines: list[str] = []
    reason = "operation not permitted when stream is capturing"

    def record(function: Callable[[], Tensor]) -> Recording:
        raise RuntimeError(f"{reason}\nCUDA kernel errors might be reported later")

    learner = recorded(small_learner(), record, lines.append)
    assert_same_bits(train(learner), train(small_learner()))
    assert lines == [f"the network runs kernel by kernel: it cannot be a CUDA graph ({reason})"]
    assert "Traceback" in caplog.text


def test_other_shapes_are_recorded_anew() -> None:
    learner, other = recorded(small_learner()), small_learner()
    for count in (8, 16, 8):
        for one in (learner, other):
            one.zero_grad()
            one.backward(images(count, count), torch.arange(count) // 2, 0, torch.Generator(), SLICES)
        assert_same_bits(*([p.grad for p in one.parameters() if p.grad is not None] for one in (learner, other)))


def test_compiled_networks_take_the_shapes_that_come_often() -> None:
    taken: list[int] = []

    def fast(x: Tensor) -> Tensor:
        taken.append(len(x))
        return learner.backbone(x)

    learner = small_learner()
    learner.passes = Passes(learner.backbone, fast, BATCH)
    assert_same_bits(train(learner), train(small_learner()))
    assert taken == [*[2] * 2 * SLICES, BATCH, BATCH] * STEPS


def learner_with_methods() -> Learner:
    torch.manual_seed(0)
    loss = base_losses.build("multi_similarity", CLASSES, DIM)
    iaa = ClassAugmentation(CLASSES, DIM, 10, 0.3, 2, 0.1, 1, 0.2, "diag", 2, 0.1, 0.1, 40)
    iaa.estimate([(torch.randn(20, DIM), torch.arange(20) % CLASSES)])
    sgar = IntensityRanking(DIM, 0.3, 4, 0.11, 0.2, 32.0, 0.05, 32.0, 0.1, False)
    namr = ClusterRanking(heads.Structure(128, DIM), 3, 3.0, 10.0, "even")
    weights = Weights(0.2, 0.2, 0.5)
    return Learner(backbones.build("small", "none"), heads.linear(128, DIM), loss, weights, iaa, sgar, namr)


def steps_over_epochs(learner: Learner, generator: torch.Generator) -> list[Tensor]:
    """Weights and losses of steps in which synthetics begin, their intensity falls, and the variation changes."""
    optimizer, terms = torch.optim.SGD(learner.parameters(), lr=0.1), []
    for step, epoch in enumerate([0, 0, 1, 1, 5, 5, 6, 0]):
        optimizer.zero_grad()
        generator.manual_seed(step)
        labels = torch.arange(8) // 2
        terms += [*learner.backward(images(step), labels, epoch, generator, SLICES)]
        optimizer.step()
        assert learner.iaa is not None
        learner.iaa.corrected.mul_(1.1)
    return [*learner.state_dict().values(), torch.stack(terms)]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_recorded_loss_is_that_of_kernels_whatever_the_epoch(frozen: bool) -> None:
    learner, other = learner_with_methods(), learner_with_methods()
    for one in (learner, other):
        one.backbone.requires_grad_(not frozen)
    generator, recordings = torch.Generator(), list[Recording]()

    def record(function: Callable[[], Tensor]) -> Recording:
        recordings.append(rerun(function))
        return recordings[-1]

    learner.run_loss = RecordedLoss([generator], [*learner.buffers()], print, record)
    assert_same_bits(steps_over_epochs(learner, generator), steps_over_epochs(other, torch.Generator()))
    assert len(recordings) == 4  # before synthetics, at each intensity, and once more without


def test_what_is_added_up_is_not_overwritten_by_the_next_replay() -> None:
    learner, other = learner_with_methods(), learner_with_methods()
    generator = torch.Generator()
    learner.run_loss = RecordedLoss([generator], [*learner.buffers()], print, rerun)
    for step in range(2):
        for one in (learner, other):
            one.backward(images(step), torch.arange(8) // 2, 0, generator.manual_seed(step), SLICES)
    assert_same_bits(*([p.grad for p in one.parameters() if p.grad is not None] for one in (learner, other)))


def test_a_loss_that_cannot_be_recorded_says_so_once_and_runs_on() -> None:
    lines: list[str] = []

    def record(function: Callable[[], Tensor]) -> Recording:
        raise RuntimeError("called a synchronizing CUDA operation")

    generator, learner = torch.Generator(), learner_with_methods()
    learner.run_loss = RecordedLoss([generator], [*learner.buffers()], lines.append, record)
    expected = steps_over_epochs(learner_with_methods(), torch.Generator())
    assert_same_bits(steps_over_epochs(learner, generator), expected)
    line = "the loss runs kernel by kernel: it cannot be a CUDA graph (called a synchronizing CUDA operation)"
    assert lines == [line]
