"""Sums and rows over a number of processes that is no power of two, and the tree of sums for any numbers."""

from pathlib import Path

import pytest
import torch

from dml_core.gather import broadcast_object, gather, own_rows, rank, slices_of, tree, tree_sum
from tests import ranks

WORLD = 3
SLICES = (3, 5, 8)


def parts_of(slices: range) -> list[torch.Tensor]:
    """What each of the slices gives, in float32: sums in another order have other bits."""
    return [torch.randn(50, generator=torch.Generator().manual_seed(number)) for number in slices]


def batch() -> torch.Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def loss_of(rows: torch.Tensor) -> torch.Tensor:
    """Of all pairs, so that every row's gradient depends on every other row."""
    return (rows @ rows.T).sigmoid().square().sum()


def run_rank(folder: Path) -> None:
    everyone = gather(torch.arange(2) + 10 * rank())
    sums = {count: tree_sum(parts_of(slices_of(rank(), WORLD, count)), count) for count in SLICES}
    x = own_rows(batch(), 8).requires_grad_()
    rows = gather(x, 8)
    loss_of(rows).backward()
    results = {"sum": sums, "gradient": x.grad, "rows": rows.detach()}
    results |= {"all": everyone, "own": own_rows(everyone), "broadcast": broadcast_object(rank())}
    torch.save(results, folder / f"{rank()}.pt")


@pytest.fixture(scope="module")
def rank_results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("gather")
    ranks.run(run_rank, WORLD, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def test_three_processes_sum_all_slices_to_the_bits_of_one(rank_results: list[dict]) -> None:
    for count in SLICES:
        alone = tree_sum(parts_of(range(count)))
        for result in rank_results:
            assert torch.equal(result["sum"][count], alone)


def test_rows_come_in_rank_order_and_go_back(rank_results: list[dict]) -> None:
    for number, result in enumerate(rank_results):
        assert result["all"].tolist() == [0, 1, 10, 11, 20, 21]
        assert result["own"].tolist() == [10 * number, 10 * number + 1]
        assert result["broadcast"] == 0 and torch.equal(result["rows"], batch())


def test_the_mean_over_ranks_of_gathered_gradients_is_that_of_one_process(rank_results: list[dict]) -> None:
    whole = batch().requires_grad_()
    loss_of(whole).backward()
    mean = torch.cat([result["gradient"] for result in rank_results]) / WORLD
    torch.testing.assert_close(mean, whole.grad, rtol=1e-12, atol=1e-12)


def test_alone_the_tree_is_that_of_the_parts() -> None:
    a, b, c, d = parts_of(range(4))
    assert torch.equal(tree_sum([a, b, c, d]), (a + b) + (c + d))
    assert torch.equal(tree_sum([a, b, c]), (a + b) + c)
    assert torch.equal(tree_sum([a]), a)


@pytest.mark.parametrize("slices", range(1, 17))
def test_the_bracket_of_the_tree_is_the_same_however_slices_are_dealt(slices: int) -> None:
    """The bracket is that of the definition, each slice comes once, and only ranks that hold a node send it."""

    def bracket(level: int, node: int) -> object:
        """Node k of level l covers the slices k 2^l .. min((k + 1) 2^l, S) - 1."""
        first, middle = node << level, (2 * node + 1) << (level - 1) if level else 0
        if level == 0:
            return first
        left = bracket(level - 1, 2 * node)
        return (left, bracket(level - 1, 2 * node + 1)) if middle < slices else left

    for world in range(1, slices + 1):
        shares = [slices_of(rank, world, slices) for rank in range(world)]
        assert [number for share in shares for number in share] == [*range(slices)]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        nodes: list[dict[int, object]] = [{number: number for number in share} for share in shares]
        for level in tree(slices, world):
            ends = [end for merge in level if merge.to != merge.source for end in ((0, merge.source), (1, merge.to))]
            assert len({*ends}) == len(ends), "a rank sends and receives once a level at most"
            for left, right, to, source in level:
                nodes[to][left] = (nodes[to][left], nodes[source].pop(right))
        (root,) = nodes[0].values()
        assert root == bracket((slices - 1).bit_length(), 0) and not any(nodes[1:])


UNEQUAL = {
    "rows": lambda: torch.zeros(2 + rank(), 3),
    "columns": lambda: torch.zeros(2, 3 + rank()),
    "type": lambda: torch.zeros(2, 3, dtype=torch.float64 if rank() == 1 else torch.float32),
    "dimensions": lambda: torch.zeros(2, 3) if rank() else torch.zeros(2, 3, 1),
    "a shape that was sent before": lambda: torch.zeros(4 if rank() == 2 else 2, 3),
    "slices": lambda: torch.zeros(2, 3),
}


def run_unequal(folder: Path) -> None:
    messages = {}
    for rows in (2, 4):
        gather(torch.zeros(rows, 3))
    for name, make in UNEQUAL.items():
        try:
            gather(make(), 6 + rank() if name == "slices" else None)
        except ValueError as error:
            messages[name] = str(error)
    messages["then"] = gather(torch.full((1,), rank())).tolist()
    torch.save(messages, folder / f"{rank()}.pt")


def test_unequal_slices_are_told_with_ranks_and_shapes_on_every_rank(tmp_path: Path) -> None:
    ranks.run(run_unequal, WORLD, tmp_path)
    told = [torch.load(tmp_path / f"{number}.pt") for number in range(WORLD)]
    assert told[0].keys() == {*UNEQUAL, "then"}, "none is refused without a message"
    assert told[0] == told[1] == told[2] and told[0]["then"] == [0, 1, 2]
    assert told[0]["rows"] == (
        "gather needs slices of one shape and type on every rank: rank 0 has (2, 3) float32 of 3 slices; "
        "rank 1 has (3, 3) float32 of 3 slices; rank 2 has (4, 3) float32 of 3 slices"
    )
    assert "rank 1 has (2, 3) float64" in told[0]["type"]


def run_uneven(folder: Path) -> None:
    """Eight slices on three ranks, two rows each; then a row less than the slices of rank 1."""
    gather(torch.zeros(2 * len(slices_of(rank(), WORLD, 8)), 1), 8)
    with pytest.raises(ValueError, match=r"rank 1 has \(5, 1\) float32 of 8 slices"):
        gather(torch.zeros(2 * len(slices_of(rank(), WORLD, 8)) - (rank() == 1), 1), 8)


def test_ranks_with_more_slices_have_more_rows(tmp_path: Path) -> None:
    ranks.run(run_uneven, WORLD, tmp_path)
