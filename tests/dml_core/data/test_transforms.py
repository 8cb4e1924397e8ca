"""Random views: what they do is torchvision's, how they are drawn is a function of a view's own seed."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from dml_core.data.sampling import INCREMENT, _mix, derive_seed, draw_uniform
from dml_core.data.transforms import CROP_NUMBERS, SHIFT_NUMBERS, crop_box, shift, shift_maps


def test_mixed_counters_are_the_published_numbers_of_splitmix64() -> None:
    counters = np.uint64(1234567) + INCREMENT * np.arange(1, 6, dtype=np.uint64)
    assert _mix(counters).tolist() == [
        *(6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821)
    ]


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**63), min_size=1, max_size=9), st.integers(1, 9))
def test_a_seeds_numbers_depend_on_nothing_else(seeds: list[int], count: int) -> None:
    together = draw_uniform(seeds, count + 1)
    for seed, row in zip(seeds, together, strict=True):
        assert draw_uniform([seed], count)[0].tolist() == row[:count].tolist()
    assert ((together >= 0) & (together < 1)).all()


def test_numbers_of_seeds_that_follow_each_other_are_uniform_and_independent() -> None:
    first = derive_seed(0, 1, 2)
    numbers = draw_uniform(range(first, first + 20_000), 6)
    counts = np.stack([np.histogram(column, 20, (0, 1))[0] for column in numbers.T])
    assert (((counts - 1000) ** 2 / 1000).sum(1) < 43.8).all()  # chi-square, 19 degrees of freedom: 0.1 %
    others = np.concatenate([numbers[1:], numbers[:-1]], 1)
    assert abs(np.corrcoef(others.T) - np.eye(12)).max() < 0.03


def torchvisions_shift(picture: torch.Tensor, numbers: np.ndarray) -> torch.Tensor:
    """One picture (C, S, S), with the numbers that RandomAffine(8, (0.08, 0.08), (0.9, 1.1), 6) would draw."""
    turn, right, down, scale, shear = (2 * numbers - 1).tolist()
    move = [round(0.08 * picture.shape[-1] * share) for share in (right, down)]
    return v2.functional.affine(picture.double(), 8 * turn, move, 1 + 0.1 * scale, [6 * shear, 0.0]).to(torch.uint8)


@pytest.mark.parametrize(("size", "channels"), [(32, 1), (33, 3)])
def test_shifted_batch_is_torchvisions_affine_picture_by_picture(size: int, channels: int) -> None:
    pictures = torch.randint(256, (60, channels, size, size), dtype=torch.uint8)
    numbers = np.concatenate([draw_uniform(range(58), SHIFT_NUMBERS), np.zeros((1, 5)), np.ones((1, 5))])
    shifted = shift(pictures, torch.from_numpy(shift_maps(numbers, size)))
    for view, picture, row in zip(shifted, pictures, numbers, strict=True):
        assert torch.equal(view, torchvisions_shift(picture, row))
    assert (shifted == 0).float().mean() > 0.01  # black outside


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 19), max_size=4))
def test_bits_of_a_view_do_not_depend_on_the_batch(cuts: list[int]) -> None:
    pictures = torch.randint(256, (20, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def views(first: int, last: int) -> torch.Tensor:
        maps = torch.from_numpy(shift_maps(draw_uniform(range(first, last), SHIFT_NUMBERS), 32))
        return shift(pictures[first:last], maps)

    ends = sorted({0, 20, *cuts})
    parts = [views(first, last) for first, last in itertools.pairwise(ends)]
    assert torch.equal(torch.cat(parts), views(0, 20))


def test_middle_numbers_change_nothing() -> None:
    picture = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(shift(picture, torch.from_numpy(shift_maps(np.full((1, 5), 0.5), 32))), picture)


def boxes(height: int, width: int, count: int) -> np.ndarray:
    return np.array([crop_box(numbers, height, width) for numbers in draw_uniform(range(count), CROP_NUMBERS)])


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 120), (90, 90)])
def test_crops_are_distributed_as_torchvisions(height: int, width: int) -> None:
    library = v2.RandomResizedCrop(8, scale=(0.4, 1.0), ratio=(3 / 4, 4 / 3))
    torch.manual_seed(0)
    picture = torch.empty(1, height, width)
    drawn = [library.make_params([picture]) for _ in range(4000)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in drawn])
    ours = boxes(height, width, 4000)
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= (height, width)).all()
    facts = []
    for top, left, h, w in (ours.T, theirs.T):
        facts.append([top, left, h, w, h * w, np.log(w / h), top + h, left + w])
    for one, other in zip(*facts, strict=True):
        for quantity in (lambda x: x, np.square):
            x, y = quantity(one), quantity(other)
            assert abs(x.mean() - y.mean()) <= 4 * np.sqrt((x.var() + y.var()) / 4000)


@pytest.mark.parametrize(("height", "width"), [(1, 9000), (9000, 1), (3, 500), (400, 120)])
def test_what_never_fits_is_torchvisions_middle(height: int, width: int) -> None:
    numbers = np.full(CROP_NUMBERS, 1 - 2**-53)  # the largest areas
    numbers[1:20:2] = 0.0 if height < width else 1 - 2**-53  # of the ratio that fits least
    library = v2.RandomResizedCrop(8, scale=(1e3, 1e3), ratio=(3 / 4, 4 / 3))  # of areas that never fit
    middle = library.make_params([torch.empty(1, height, width)])
    expected = [middle["top"], middle["left"], middle["height"], middle["width"]]
    assert [*crop_box(numbers, height, width)] == expected
