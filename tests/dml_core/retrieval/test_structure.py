import faiss
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dml_core.ranking.clusters import adaptive_distance
from dml_core.retrieval.neighbors import Neighbors, fill_scores, reorder
from dml_core.retrieval.structure import index_vectors, query_vectors

QUERIES, GALLERY, DIM = 20, 400, 16


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randn(n, DIM, generator=generator, dtype=dtype) for n in (QUERIES, GALLERY))
    return query, 0.5 + torch.rand(QUERIES, DIM, generator=generator, dtype=dtype), gallery


def differences(query: Tensor, s: Tensor, gallery: Tensor) -> Tensor:
    return (s[:, None] * (query[:, None] - gallery).square()).sum(2)


def test_inner_products_are_distances_up_to_a_term_of_the_query():
    query, s, gallery = inputs()
    product = query_vectors(query, s) @ index_vectors(gallery).T
    constant = (s * query * query).sum(1, keepdim=True)
    torch.testing.assert_close(constant - product, differences(query, s, gallery))


def test_order_is_that_of_the_training_distance():
    z, s, _ = inputs()
    product = query_vectors(z, s) @ index_vectors(z).T
    assert torch.equal(product.argsort(1, descending=True), adaptive_distance(z, s).argsort(1))


@pytest.mark.parametrize(("kind", "recall"), [("Flat", 1.0), ("IVF8,Flat", 0.9), ("HNSW32,Flat", 0.9)])
def test_unmodified_faiss_indexes(kind, recall):
    """Unit embeddings in classes, as a trained model gives them. (On raw noise the approximate indexes find half.)"""
    query, s, gallery = inputs(torch.float32)
    centers = torch.randn(20, DIM, generator=torch.Generator().manual_seed(1))
    query, gallery = (normalize(0.5 * x + centers.repeat(len(x) // 20, 1)) for x in (query, gallery))
    index = faiss.index_factory(2 * DIM, kind, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(index_vectors(gallery).numpy())
        index.nprobe = 4
    index.add(index_vectors(gallery).numpy())
    best = torch.from_numpy(index.search(query_vectors(query, s).numpy(), 10)[1])
    expected = differences(*(x.double() for x in (query, s, gallery))).topk(10, largest=False).indices
    if recall == 1:
        assert torch.equal(best, expected)
    share = (best[:, :, None] == expected[:, None]).any(2).double().mean()
    assert share >= recall


def reordered_top(query: Tensor, s: Tensor, gallery: Tensor, top: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Distances and positions (n, K) of each query's candidates, -1 for none, ordered as the metrics do."""
    best = Neighbors(torch.zeros(top.shape, dtype=query.dtype).masked_fill(top < 0, -torch.inf), top)
    product = best.similarity.clone()
    for number, block in enumerate(gallery.split(rows)):
        fill_scores(product, best.position, query_vectors(query, s) @ index_vectors(block).T, number * rows)
    product, position = reorder(best, product)
    return ((s * query * query).sum(1, keepdim=True) - product).sqrt(), position


@pytest.mark.parametrize("rows", [7, GALLERY])
def test_reordering_the_top(rows: int):
    query, s, gallery = inputs()
    top = torch.cdist(query, gallery).topk(30, largest=False).indices
    distance, position = reordered_top(query, s, gallery, top, rows)
    exact = differences(query, s, gallery).sqrt()
    torch.testing.assert_close(distance, exact.gather(1, position))
    assert (distance.diff(dim=1) >= 0).all() and torch.equal(position.sort(1).values, top.sort(1).values)


def test_reordering_the_whole_gallery_is_the_exact_search():
    query, s, gallery = inputs()
    product = query_vectors(query, s) @ index_vectors(gallery).T
    _, position = reordered_top(query, s, gallery, torch.arange(GALLERY).expand(QUERIES, -1), GALLERY)
    assert torch.equal(position, product.argsort(1, descending=True))


def test_reordering_keeps_ties_in_order_and_empty_places_last():
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.0]])
    top = torch.tensor([[-1, 1, 0, 2]])
    distance, position = reordered_top(torch.zeros(1, 2), torch.ones(1, 2), gallery, top, 2)
    assert position.tolist() == [[2, 1, 0, -1]] and distance.tolist() == [[0.5, 1, 1, torch.inf]]
