"""The irrelevant items above each relevant one, by both ways of counting, against rankings that are sorted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dml_core.retrieval import full_list
from dml_core.retrieval.full_list import count_outranking, relevant_positions, sort_relevant
from tests.dml_core.retrieval.gpu_way import search_as_a_gpu
from tests.dml_core.retrieval.test_neighbors import signs


def test_the_items_of_a_class() -> None:
    targets = torch.tensor([5, 3, 5, 9, 3, 5])
    gallery = targets.argsort(stable=True)
    labels = torch.tensor([3, 5, 4, 9, 10, 1])
    expected = [[1, 4, -1], [0, 2, 5], [-1] * 3, [3, -1, -1], [-1] * 3, [-1] * 3]
    assert relevant_positions(labels, targets[gallery], gallery, 3).tolist() == expected


def count_by_sorting(similarity: Tensor, same: Tensor) -> list[list[int]]:
    """For each query the irrelevant items above each of its relevant ones, the worst first."""
    counts = []
    for values, relevant in zip(similarity, same.tolist(), strict=True):
        ranking = values.sort(descending=True, stable=True).indices.tolist()
        places = [place for place, item in enumerate(ranking) if relevant[item]]
        counts.append([place - above for above, place in enumerate(places)][::-1])
    return counts


@pytest.mark.parametrize("as_a_gpu", [False, True])
@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(1, 80), st.integers(1, 4), st.integers(0, 999))
def test_outranked_counts_irrelevant_items_above_each_relevant_one(
    as_a_gpu: bool, q: int, size: int, dim: int, seed: int
) -> None:
    similarity = signs(q, dim, seed=seed) @ signs(size, dim, seed=seed + 1).T
    same = torch.rand(q, size, generator=torch.Generator().manual_seed(seed)) < 0.3
    offset, total = 10, same.sum(1)
    position = torch.where(same, torch.arange(size) + offset, -1)
    most = max(1, int(total.max()))
    relevant = sort_relevant(position, similarity.masked_fill(~same, torch.inf), total, most)
    irrelevant = similarity.masked_fill(same, -torch.inf)
    if as_a_gpu:
        with search_as_a_gpu(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(full_list, "COUNTED", 7 * q)  # seven columns at a time
            counts = count_outranking(relevant, irrelevant, offset)
    else:
        counts = count_outranking(relevant, irrelevant, offset)
    assert counts.shape == (q, most + 1) and (counts.sum(1) == size).all()
    above = counts.flip(1).cumsum(1).flip(1)[:, 1:]
    for row, expected in zip(above.tolist(), count_by_sorting(similarity, same), strict=True):
        assert row[: len(expected)] == expected
