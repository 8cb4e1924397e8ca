import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dml_core.retrieval.neighbors import BLOCK, GALLERY_BLOCK, block_rows, leave_out, nearest, owned_rows, similarities


def normal(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def signs(*shape: int, seed: int = 0) -> Tensor:
    """Corners of a cube: all inner products are exact small integers, and most of them tie."""
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


def in_blocks(gallery: Tensor, rows: int) -> list[tuple[int, Tensor]]:
    return [(i * rows, block) for i, block in enumerate(gallery.split(rows))]


def full_sort(query: Tensor, gallery: Tensor, k: int, own_positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    similarity = query @ gallery.T
    if own_positions is not None:
        similarity[torch.arange(len(query)), own_positions] = -torch.inf
    values, order = similarity.sort(dim=1, descending=True, stable=True)
    order[values == -torch.inf] = -1
    missing = max(0, k - len(gallery))
    return F.pad(values[:, :k], (0, missing), value=-torch.inf), F.pad(order[:, :k], (0, missing), value=-1)


@pytest.mark.parametrize("size", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, GALLERY_BLOCK, GALLERY_BLOCK + 1])
@pytest.mark.parametrize("k", [1, 7, 300])
def test_nearest_equals_a_stable_sort_of_all_similarities(size: int, k: int) -> None:
    for make in (normal, signs):
        gallery = make(size, 8)
        own_positions = torch.randperm(size, generator=torch.Generator().manual_seed(1))[: BLOCK + 3]
        query = gallery[own_positions]
        best = nearest(query, in_blocks(gallery, GALLERY_BLOCK), k, own_positions)
        values, order = full_sort(query, gallery, k, own_positions)
        torch.testing.assert_close(best.similarity, values, rtol=1e-12, atol=1e-12)
        assert torch.equal(best.position, order)


@pytest.mark.parametrize("rows", [100, 256, 1000, 5000])
def test_nearest_does_not_depend_on_the_gallery_blocks(rows: int) -> None:
    query, gallery = signs(20, 12), signs(5000, 12, seed=1)
    assert torch.equal(nearest(query, in_blocks(gallery, rows), 50).position, full_sort(query, gallery, 50)[1])


def test_equal_items_come_by_position() -> None:
    gallery = normal(1, 16).expand(5000, 16).contiguous()
    own_positions = torch.tensor([0, 2, 4999])
    best = nearest(gallery[own_positions], in_blocks(gallery, GALLERY_BLOCK), 4, own_positions)
    assert best.position.tolist() == [[1, 2, 3, 4], [0, 1, 3, 4], [0, 1, 2, 3]]


def test_copies_of_an_item_are_equally_similar_wherever_they_stand() -> None:
    rows = F.normalize(torch.randn(50, 96, generator=torch.Generator().manual_seed(3)))
    gallery = rows.repeat(100, 1)[:4999]
    best = nearest(rows, in_blocks(gallery, GALLERY_BLOCK), 30)
    assert torch.equal(best.position, torch.arange(50)[:, None] + 50 * torch.arange(30))


def test_ascending_similarity_is_the_worst_order_and_still_exact() -> None:
    angle = torch.linspace(1.5, 0, 3 * GALLERY_BLOCK, dtype=torch.float64)
    gallery = torch.stack([angle.cos(), angle.sin()], 1)
    best = nearest(torch.tensor([[1.0, 0.0]]).double(), in_blocks(gallery, GALLERY_BLOCK), 5)
    assert best.position.tolist() == [[len(gallery) - i for i in range(1, 6)]]


def test_nearest_needs_no_gradient() -> None:
    query = normal(3, 4).requires_grad_()
    assert not nearest(query, [(0, query)], 2).similarity.requires_grad


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(1, 400), st.integers(1, 70), st.integers(1, 6), st.integers(0, 999))
def test_any_sizes_any_ties(queries: int, size: int, k: int, dim: int, seed: int) -> None:
    query, gallery = signs(queries, dim, seed=seed), signs(size, dim, seed=seed + 1)
    best = nearest(query, in_blocks(gallery, 128), k)
    values, order = full_sort(query, gallery, k)
    assert torch.equal(best.similarity, values) and torch.equal(best.position, order)


@settings(max_examples=50)
@given(st.integers(1, 200_000), st.integers(1, 9))
def test_every_row_has_one_owner(total: int, world: int) -> None:
    rows = [owned_rows(total, rank, world) for rank in range(world)]
    assert torch.equal(torch.cat(rows).sort().values, torch.arange(total))
    assert GALLERY_BLOCK % block_rows(total) == 0 and block_rows(total) % BLOCK == 0


def test_block_rows_grow_with_the_set() -> None:
    assert [block_rows(n) for n in (1, 8192, 8193, 20_000, 10**6)] == [256, 256, 512, 1024, 1024]


def test_larger_query_blocks() -> None:
    query, gallery = normal(700, 8), normal(300, 8, seed=1)
    blocks = [s.clone() for _, _, s in similarities(query.split(512), [(0, gallery)], None, 512)]
    assert [s.shape for s in blocks] == [(512, 512), (188, 512)]
    torch.testing.assert_close(torch.cat(blocks)[:, :300], query @ gallery.T)
    assert (torch.cat(blocks)[:, 300:] == -torch.inf).all()


def test_items_are_left_out_of_the_block_that_has_them() -> None:
    similarity = torch.arange(12.0).view(2, 6)
    position = torch.tensor([[9, 10, 10, 15, 16], [-1, -1, 12, 20, 3]])
    leave_out(similarity, position, 10)
    assert similarity.isinf().nonzero().tolist() == [[0, 0], [0, 5], [1, 2]]
    assert similarity[0, 1:5].tolist() == [1, 2, 3, 4] and similarity[1, 5] == 11
