"""Sums and rows over a number of processes that is no power of two."""

from pathlib import Path

import pytest
import torch

from dml_core.gather import broadcast_object, gather, own_rows, rank, tree_sum
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
    results = {"sum": {count: tree_sum(parts_of(rank(), count)) for count in (1, 3, 4)}}
    x = batch().chunk(WORLD)[rank()].requires_grad_()
    loss_of(gather(x)).backward()
    results["gradient"] = x.grad
    results |= {"all": everyone, "own": own_rows(everyone), "broadcast": broadcast_object(rank())}
    torch.save(results, folder / f"{rank()}.pt")


@pytest.fixture(scope="module")
def rank_results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("gather")
    ranks.run(run_rank, WORLD, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def test_three_processes_sum_all_parts_and_agree_to_the_bit(rank_results: list[dict]) -> None:
    for count in (1, 3, 4):
        expected = torch.stack([part for rank in range(WORLD) for part in parts_of(rank, count)]).sum(0)
        for result in rank_results:
            torch.testing.assert_close(result["sum"][count], expected, rtol=1e-12, atol=1e-12)
            assert torch.equal(result["sum"][count], rank_results[0]["sum"][count])


def test_rows_come_in_rank_order_and_go_back(rank_results: list[dict]) -> None:
    for number, result in enumerate(rank_results):
        assert result["all"].tolist() == [0, 1, 10, 11, 20, 21]
        assert result["own"].tolist() == [10 * number, 10 * number + 1]
        assert result["broadcast"] == 0


def test_the_mean_over_ranks_of_gathered_gradients_is_that_of_one_process(rank_results: list[dict]) -> None:
    whole = batch().requires_grad_()
    loss_of(whole).backward()
    mean = torch.cat([result["gradient"] for result in rank_results]) / WORLD
    torch.testing.assert_close(mean, whole.grad, rtol=1e-12, atol=1e-12)


def test_alone_the_tree_is_that_of_the_parts() -> None:
    a, b, c, d = parts_of(0, 4)
    assert torch.equal(tree_sum([a, b, c, d]), (a + b) + (c + d))
    assert torch.equal(tree_sum([a, b, c]), (a + b) + c)
