"""Structure-aware search in an ordinary inner-product index.

The adaptive distance of NASA (Li et al., AAAI 2022), d(q, x) = sqrt(sum_k s_k (q_k - x_k)^2) with the query's structure
embedding s, is an inner product up to a term of the query alone:
  -d^2(q, x) = <[2 s*q, -s], [x, x*x]> - sum_k s_k q_k^2.
Approximate indexes (IVF, HNSW) find best what has about the same norm: normalise embeddings first.
But:
- NASA re-ranks the top of a plain search, as `retrieval_metrics(rerank=...)` does. The vectors here search the whole
  gallery exactly, too.
"""

import torch
from torch import Tensor


def index_vectors(z: Tensor) -> Tensor:
    """Return the vectors of the gallery that an inner-product index stores.

    Args:
        z: (n, D) embeddings.

    Returns:
        (n, 2D) vectors [z, z*z].
    """
    return torch.cat([z, z * z], 1)


def query_vectors(z: Tensor, s: Tensor) -> Tensor:
    """Return the vectors of queries: the larger their product with an index vector, the smaller the adaptive distance.

    Args:
        z: (n, D) embeddings of the queries.
        s: (n, D) their structure embeddings.

    Returns:
        (n, 2D) vectors [2 s*z, -s].
    """
    return torch.cat([2 * s * z, -s], 1)
