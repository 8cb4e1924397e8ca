"""An index of embeddings in a folder, opened by mapping its files into memory, and searched. index_build.py makes one.

shard-00000.faiss ...   inner product on unit vectors, or on structure.index_vectors of them
items.parquet           id (position in the index), path, label
model/                  of a checkpoint, what it takes to embed a query
index.json              what all this is, with the sha256 of each shard; written last

Nothing in it is ever unpickled. Legend: Q queries, D dimensions, k neighbors.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from pyarrow import parquet
from pydantic import Field, ValidationError
from torch import Tensor

from dml_core.data.pictures import BadPicture
from dml_core.retrieval import index as faiss_index
from dml_core.retrieval.structure import query_vectors
from pipelines.config.sections import Positive, Section
from pipelines.models.checkpoint import model_fingerprint
from pipelines.models.embedder import Embedder

# Queries after which an index is copied to a GPU, if there is one: a copy takes about as long as a few answers.
MANY_QUERIES = 8
CACHED_ROW_GROUPS = 256  # of items.parquet, with up to 4,096 rows each: so many stay in memory

IndexKind = Literal["flat", "ivf", "hnsw"]

FaissIndex = Any  # of faiss, which has no types


class Shard(Section):
    """A file of an index. The first shard holds the first rows, and so on."""

    name: Annotated[str, Field(pattern=r"^shard-\d+\.faiss$")]
    rows: Positive
    sha256: str


class About(Section):
    """What an index is: the content of index.json.

    Attributes:
        kind: Of its Faiss indexes.
        dim: D, of the embeddings.
        structure: Whether it can rank by structure.
        rows: Number of items.
        options: Of Faiss; those that were not left to their defaults.
        shards: Its files.
        trained_on: Of ivf, what found its cells: GPUs, where Faiss saw some, or the processor.
        run: The model that embedded the items, as it was named.
        fingerprint: Of that model, see models.checkpoint.model_fingerprint.
        root: Of the items' paths; None: they have none, or it was not noted.
    """

    kind: IndexKind
    dim: Positive
    structure: bool
    rows: Positive
    options: dict[str, int]
    shards: list[Shard]
    trained_on: Literal["cpu", "gpu"] | None = None
    run: str
    fingerprint: str
    root: str | None = None


class Hits(NamedTuple):
    """The k nearest items of each query, nearest first, equals by id.

    Attributes:
        score: (Q, k) float64, cosine similarity; of a structure-aware search, adaptive distance.
        id: (Q, k); -1 where nothing was found.
    """

    score: Tensor
    id: Tensor


class Item(NamedTuple):
    """A row of items.parquet. path: below the root of the pictures."""

    id: int
    path: str | None
    label: str | None


class Hit(TypedDict):
    """An item near a query, its place in the ranking, from 1, and one of the two scores."""

    place: int
    distance: NotRequired[float]
    similarity: NotRequired[float]
    id: int
    path: str | None
    label: str | None


class Milliseconds(TypedDict):
    """How long the embedding of a query and the search took."""

    embed: float
    search: float


class Answer(TypedDict):
    """The items nearest to a picture. ranking: "structure-aware" or "plain"."""

    ranking: str
    milliseconds: Milliseconds
    hits: list[Hit]


class SearchResult(Answer):
    """What `dml index search --json` prints."""

    index: str


class Index:
    """An open index. Processes of a machine share the memory that its files take.

    Attributes:
        folder: Where it is.
        about: What it is.
    """

    def __init__(self, folder: Path, about: About, shards: Sequence[FaissIndex]):
        """See open_index."""
        self.folder, self.about, self.shards = folder, about, shards
        self.queries_asked = 0
        self.shard_offsets = np.cumsum([0, *(shard.rows for shard in about.shards[:-1])]).tolist()
        self.file = parquet.ParquetFile(folder / "items.parquet")
        group_rows = [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]
        self.group_offsets = np.cumsum([0, *group_rows[:-1]])
        self.read_group = lru_cache(CACHED_ROW_GROUPS)(self.file.read_row_group)

    def search(self, vectors: Tensor | np.ndarray, k: int = 10, structure: Tensor | np.ndarray | None = None) -> Hits:
        """Find the k nearest items of queries.

        Args:
            vectors: (Q, D), of unit length.
            k: Number of neighbors.
            structure: (Q, D), the queries' structure embeddings, for the structure-aware ranking; None: the plain one.

        Raises:
            ValueError: Other shapes; numbers that are not finite; or structure, and the index was not built for it.
        """
        z = faiss_index.checked_queries("vectors", vectors, self.about.dim, k)
        if structure is None:
            best = self._nearest(torch.cat([z, torch.zeros_like(z)], 1) if self.about.structure else z, k)
            return Hits(best.similarity, best.position)
        if not self.about.structure:
            raise ValueError(f"{self.folder}: not built with --structure")
        s = faiss_index.checked_queries("structure", structure, self.about.dim)
        if len(s) != len(z):
            raise ValueError(f"structure: {len(s)} rows for {len(z)} vectors")
        best = self._nearest(query_vectors(z, s), k)
        constant = (s.double() * z.double().square()).sum(1, keepdim=True)
        return Hits((constant - best.similarity).clamp(min=0).sqrt(), best.position)

    def _nearest(self, queries: Tensor, k: int) -> faiss_index.Neighbors:
        self.queries_asked += len(queries)
        shards = self.fast_shards if self.queries_asked >= MANY_QUERIES else self.shards
        by_shard = [faiss_index.search(shard, queries, k) for shard in shards]
        return faiss_index.merge_shards(by_shard, self.shard_offsets, k)

    @cached_property
    def fast_shards(self) -> list[FaissIndex]:
        """The shards, copied to a GPU if there is one for their kind."""
        return [faiss_index.copy_to_gpu(shard, self.about.kind) for shard in self.shards]

    def items(self, ids: Sequence[int]) -> list[Item]:
        """Read the items of these ids, in their order."""
        items = []
        for i in ids:
            group = int(np.searchsorted(self.group_offsets, i, "right")) - 1
            row = self.read_group(group).slice(i - int(self.group_offsets[group]), 1).to_pylist()[0]
            items.append(Item(**row))
        return items

    def ask(self, picture: bytes, k: int = 10, plain: bool = False) -> Answer:
        """Find the k items nearest to an encoded picture.

        Args:
            picture: JPEG, PNG, ...
            k: Number of neighbors; at most all items.
            plain: Rank by cosine where the index can rank by structure.

        Raises:
            BadPicture: It cannot be read.
        """
        by_structure, model = self.about.structure and not plain, self.model
        started = perf_counter()
        query = model.vectors([picture])
        embedded = perf_counter()
        nearest = self.search(query["vector"], min(k, self.about.rows), query["structure"] if by_structure else None)
        items = self.items([i for i in nearest.id[0].tolist() if i >= 0])
        milliseconds = Milliseconds(embed=1000 * (embedded - started), search=1000 * (perf_counter() - embedded))
        scored = zip(items, nearest.score[0].tolist(), strict=False)
        hits = [_make_hit(place, item, score, by_structure) for place, (item, score) in enumerate(scored, 1)]
        return Answer(ranking="structure-aware" if by_structure else "plain", milliseconds=milliseconds, hits=hits)

    @cached_property
    def model(self) -> Embedder:
        """What embeds queries as the items were embedded. ValueError where it is damaged, or another."""
        model = Embedder(self.folder / "model")
        if model_fingerprint(self.folder / "model") != self.about.fingerprint:
            raise ValueError(f"{self.folder}/model: not the model that embedded the items")
        return model


def _make_hit(place: int, item: Item, score: float, by_structure: bool) -> Hit:
    if by_structure:
        return Hit(place=place, distance=score, id=item.id, path=item.path, label=item.label)
    return Hit(place=place, similarity=score, id=item.id, path=item.path, label=item.label)


def open_index(folder: str | Path, verify: bool = True) -> Index:
    """Open an index, which can then be searched again and again.

    Args:
        folder: Of `dml index build`.
        verify: Read every shard once to compare its sha256; else they are read where a search looks.

    Raises:
        ValueError: There is no index, or a shard is damaged.
    """
    root = Path(folder)
    try:
        about = About.model_validate_json((root / "index.json").read_bytes())
    except OSError:
        raise ValueError(f"{folder}: not an index: there is no index.json in it") from None
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(map(str, wrong["loc"]))
        what = f"{key}={wrong['input']!r}: {wrong['msg']}" if key else f"damaged ({wrong['msg']})"
        raise ValueError(f"{folder}/index.json: {what}") from None
    shards = []
    for shard in about.shards:
        path = root / shard.name
        if not path.is_file() or (verify and hash_file(path) != shard.sha256):
            raise ValueError(f"{path}: missing or damaged; its sha256 is not the one in index.json")
        shards.append(faiss_index.open_mapped(str(path)))
        if (shards[-1].ntotal, shards[-1].d) != (shard.rows, about.dim * (1 + about.structure)):
            raise ValueError(f"{path}: not of the size that index.json tells")
    return Index(root, about, shards)


def hash_file(path: Path) -> str:
    """Return a file's sha256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def search_index(folder: str, image: Path, k: int = 10, plain: bool = False) -> SearchResult:
    """Open an index and find the items nearest to a picture.

    Args:
        folder: Of the index.
        image: A picture's file.
        k: Number of neighbors.
        plain: Rank by cosine where the index can rank by structure.

    Raises:
        ValueError: There is no such index or picture, or an option cannot act.
    """
    if k < 1:
        raise ValueError(f"-k {k}: must be at least 1")
    index = open_index(folder)
    if plain and not index.about.structure:
        raise ValueError(f"--plain cannot act: {folder} was not built with --structure")
    try:
        return {"index": folder, **index.ask(image.read_bytes(), k, plain)}
    except OSError as error:
        raise ValueError(f"--image {image}: {error.strerror}") from None
    except BadPicture as error:
        raise ValueError(f"--image {image}: {error.bad[0][1]}") from None
