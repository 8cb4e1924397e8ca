"""Sums and rows over a number of processes that is no power of two."""

from pathlib import Path

import pytest
import torch

from dml_core.gather import agreed, gather, own_rows, rank, tree_sum
from tests import ranks

WORLD = 3


def parts_of(rank: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(count)]


def batch() -> torch.Tensor:
    return torch.randn(2 * WORLD, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def loss_of(rows: torch.Tensor) -> torch.Tensor:
    """Of all pairs, so that every row's gradient depends on every other row."""
    return (rows @ rows.T).sigmoid().square().sum()


def run_rank(folder: Path) -> None:
    everyone = gather(torch.arange(2) + 10 * rank())
    found = {"sum": {count: tree_sum(parts_of(rank(), count)) for count in (1, 3, 4)}}
    x = batch().chunk(WORLD)[rank()].requires_grad_()
    loss_of(gather(x)).backward()
    found["gradient"] = x.grad
    found |= {"all": everyone, "own": own_rows(everyone), "agreed": agreed(rank())}
    torch.save(found, folder / f"{rank()}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("gather")
    ranks.run(run_rank, WORLD, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def test_three_processes_sum_all_parts_and_agree_to_the_bit(found: list[dict]) -> None:
    for count in (1, 3, 4):
        expected = torch.stack([part for rank in range(WORLD) for part in parts_of(rank, count)]).sum(0)
        for of_rank in found:
            torch.testing.assert_close(of_rank["sum"][count], expected, rtol=1e-12, atol=1e-12)
            assert torch.equal(of_rank["sum"][count], found[0]["sum"][count])


def test_rows_come_in_rank_order_and_go_back(found: list[dict]) -> None:
    for number, of_rank in enumerate(found):
        assert of_rank["all"].tolist() == [0, 1, 10, 11, 20, 21]
        assert of_rank["own"].tolist() == [10 * number, 10 * number + 1]
        assert of_rank["agreed"] == 0


def test_the_mean_over_ranks_of_gathered_gradients_is_that_of_one_process(found: list[dict]) -> None:
    whole = batch().requires_grad_()
    loss_of(whole).backward()
    mean = torch.cat([of_rank["gradient"] for of_rank in found]) / WORLD
    torch.testing.assert_close(mean, whole.grad, rtol=1e-12, atol=1e-12)


def test_alone_the_tree_is_that_of_the_parts() -> None:
    a, b, c, d = parts_of(0, 4)
    assert torch.equal(tree_sum([a, b, c, d]), (a + b) + (c + d))
    assert torch.equal(tree_sum([a, b, c]), (a + b) + c)
