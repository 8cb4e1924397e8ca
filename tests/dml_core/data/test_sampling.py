import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dml_core.data.sampling import BatchPlan, blocks, derive_seed


@given(
    counts=st.lists(st.integers(1, 9), min_size=2, max_size=12),
    images=st.integers(1, 5),
    seed=st.integers(0, 99),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_every_batch_is_p_by_k(counts: list[int], images: int, seed: int, data: st.DataObject) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    classes = data.draw(st.integers(1, len(counts)))
    plan = BatchPlan(labels, classes, images, seed).epoch(3)
    for batch in plan:
        names, images_of_class = np.unique(labels[batch], return_counts=True)
        assert len(names) == classes and (images_of_class == images).all()
        for name, count in zip(names, images_of_class, strict=True):  # no image twice while the class has others left
            mine = batch[labels[batch] == name]
            assert len(set(mine)) == min(count, counts[name])


def test_plan_is_a_function_of_seed_and_epoch() -> None:
    labels = np.repeat(np.arange(10), 6)
    one, other = (BatchPlan(labels, 4, 2, seed=5) for _ in range(2))
    one.epoch(0)
    assert (one.epoch(1) == other.epoch(1)).all()
    assert (one.epoch(1) != one.epoch(2)).any()
    assert (one.epoch(1) != BatchPlan(labels, 4, 2, seed=6).epoch(1)).any()


def test_classes_come_equally_often_and_images_once() -> None:
    labels = np.repeat(np.arange(8), 6)
    plan = BatchPlan(labels, 4, 2, seed=0).epoch(0)
    assert plan.shape == (6, 8)
    assert sorted(plan.flatten()) == list(range(48))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_columns_in_rank_order_are_the_batch(world: int) -> None:
    labels = np.repeat(np.arange(8), 6)
    plan = BatchPlan(labels, 4, 2, seed=0)
    whole = list(plan.rows(1))
    parts = [list(plan.rows(1, slice(rank * 8 // world, (rank + 1) * 8 // world))) for rank in range(world)]
    assert [[row for part in step for row in part] for step in zip(*parts, strict=True)] == whole
    assert [[sample for sample, _ in rows] for rows in whole] == plan.epoch(1).tolist()
    assert len({seed for rows in whole for _, seed in rows}) == plan.epoch(1).size


def test_too_many_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch.classes=9: the training set has only 8"):
        BatchPlan(np.arange(8), 9, 1, 0)


def test_steps_may_exceed_the_set() -> None:
    assert BatchPlan(np.repeat(np.arange(3), 2), 2, 2, 0, steps=50).epoch(0).shape == (50, 4)


def test_seeds_differ_by_every_part_of_the_key() -> None:
    assert len({derive_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}) == 125


@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 300])
def test_blocks_cover_all_rows_once(rows: int) -> None:
    batches = [(rank, batch) for rank in range(3) for batch in blocks(rows, 64, rank, 3, 10)]
    assert sorted(row for _, batch in batches for row, _ in batch) == list(range(rows))
    assert all(len(batch) <= 10 and {row // 64 % 3 for row, _ in batch} == {rank} for rank, batch in batches)
