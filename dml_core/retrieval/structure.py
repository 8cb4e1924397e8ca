"""Structure-aware search in any inner-product index, unmodified.

The adaptive distance of NASA (Li et al., AAAI 2022), d(q, x) = sqrt(sum_k s_k (q_k - x_k)^2) with the query's structure
embedding s, is an inner product up to a term of the query alone:
  -d^2(q, x) = <[2 s*q, -s], [x, x*x]> - sum_k s_k q_k^2.
Approximate indexes (IVF, HNSW) find best what has about the same norm: normalise embeddings first.
But:
- NASA re-ranks the top of a plain search; `rerank` does the same. The vectors here search the whole gallery exactly.
"""

import torch
from torch import Tensor

CHUNK = 2**22  # numbers: the differences of a chunk of queries


def index_vectors(z: Tensor) -> Tensor:
    """Gallery embeddings (n, D) -> (n, 2D), to be stored."""
    return torch.cat([z, z * z], 1)


def query_vectors(z: Tensor, s: Tensor) -> Tensor:
    """Query embeddings and their structure embeddings (n, D) -> (n, 2D): the larger the product, the smaller d."""
    return torch.cat([2 * s * z, -s], 1)


def rerank(query: Tensor, structure: Tensor, gallery: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Order each query's candidates by adaptive distance.

    query, structure (n, D); gallery (N, D); top (n, K) positions in the gallery, -1 for none (these come last, at an
    infinite distance). Returns distances (n, K), nearest first, and positions (n, K). Ties keep their order.
    """
    found = []
    rows = max(1, CHUNK // (top.shape[1] * query.shape[1]))
    for q, s, near in zip(query.split(rows), structure.split(rows), top.split(rows)):
        distance = torch.einsum("nd, nkd -> nk", s, (q[:, None] - gallery[near]).square()).sqrt()
        found.append(distance.masked_fill(near < 0, torch.inf))
    distances, order = torch.cat(found).sort(dim=1, stable=True)
    return distances, top.gather(1, order)
