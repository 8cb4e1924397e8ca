"""A GPU's way of searching, on the processor."""

from collections.abc import Iterator
from contextlib import contextmanager

from dml_core.retrieval import neighbors
from dml_core.retrieval.neighbors import BLOCK, Tiles

SMALL_TILES = Tiles(BLOCK, 4 * BLOCK, by_topk=True)


@contextmanager
def search_as_a_gpu(tiles: Tiles = SMALL_TILES) -> Iterator[None]:
    """Give tensors of the processor the tiles of a GPU, but small ones."""
    before = neighbors.TILES["cpu"]
    neighbors.TILES["cpu"] = tiles
    try:
        yield
    finally:
        neighbors.TILES["cpu"] = before
