"""Building and searching each kind of index over clustered embeddings, with recall against the exact ranking.

Clusters stand for classes: centres on the unit sphere, items around them, queries around the same centres. The shard
is written, mapped and asked for one query at a time, as a server asks; --structure weighs the dimensions around each.
Seconds are those of one thread's CPU, whatever else the machine does.

    python benchmarks/index.py [--rows 200000] [--dim 128] [--images 100] [--queries 200] [--structure]
"""

import argparse
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dml_core.retrieval import index as faiss_index
from dml_core.retrieval.index import IndexOptions
from dml_core.retrieval.structure import index_vectors, query_vectors

K = 10
CASES = [("flat", IndexOptions()), ("ivf", IndexOptions()), ("hnsw", IndexOptions())]
CASES += [("ivf", IndexOptions(nprobe=16)), ("ivf", IndexOptions(nprobe=128))]
CASES += [("hnsw", IndexOptions(ef_search=32)), ("hnsw", IndexOptions(links=16))]


def clustered(rows: int, queries: int, dim: int, images: int) -> tuple[Tensor, Tensor]:
    """(rows, dim) and (queries, dim) unit vectors around rows / images centres; cosine to the own centre about 0.7."""
    generator = torch.Generator().manual_seed(0)
    centers = F.normalize(torch.randn(rows // images, dim, generator=generator))

    def around(count: int) -> Tensor:
        own = centers[torch.randint(len(centers), (count,), generator=generator)]
        return F.normalize(own + torch.randn(count, dim, generator=generator) / dim**0.5)

    return around(rows), around(queries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 200_000), ("dim", 128), ("images", 100), ("queries", 200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--structure", action="store_true")
    given = parser.parse_args()
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    stored, queries = clustered(given.rows, given.queries, given.dim, given.images)
    if given.structure:
        s = 0.5 + torch.rand(queries.shape, generator=torch.Generator().manual_seed(1))
        stored, queries = index_vectors(stored), query_vectors(queries, s)
    exact: np.ndarray | None = None
    ranking = "structure-aware" if given.structure else "plain"
    print(f"{given.rows:,} x {given.dim}, classes of {given.images}, {ranking}")
    print(f"| kind | build, s | MiB | recall@{K} | ms a query |\n|---|---|---|---|---|")
    for kind, options in CASES:
        started = time.process_time()
        built = faiss_index.build(stored, kind, options)
        seconds = time.process_time() - started
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "shard.faiss")
            faiss_index.write(built, path)
            size, shard = Path(path).stat().st_size / 2**20, faiss_index.open_mapped(path)
            faiss_index.search(shard, queries[:8], K)
            started = time.process_time()
            found = np.concatenate([faiss_index.search(shard, query, K).position for query in queries.split(1)])
            each = (time.process_time() - started) / len(queries)
        exact = found if exact is None else exact
        recall = np.mean([len({*a} & {*b}) / K for a, b in zip(found.tolist(), exact.tolist(), strict=True)])
        name = " ".join([kind, *(f"{key}={value}" for key, value in options._asdict().items() if value)])
        print(f"| {name} | {seconds:.1f} | {size:.0f} | {recall:.3f} | {1000 * each:.2f} |", flush=True)


if __name__ == "__main__":
    main()
