"""An index of embeddings in a folder, asked through files that are mapped into memory. shards.py builds one.

shard-00000.faiss ...   inner product on unit vectors, or on structure.index_vectors of them
items.parquet           id (position in the index), path, label
model/                  of a checkpoint, what it takes to embed a query
index.json              what all this is, with the sha256 of each shard; written last

Nothing in it is ever unpickled.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Literal, NamedTuple

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

GROUPS = 256  # of items.parquet, of up to 4,096 rows: so many stay in memory


class Shard(Section):
    """rows: so many; the first shard has the first."""

    name: Annotated[str, Field(pattern=r"^shard-\d+\.faiss$")]
    rows: Positive
    sha256: str


class About(Section):
    """index.json. options: those that were given.  run, fingerprint: of the model, see embedder.fingerprint.  root: of
    the items' paths; None: they have none, or it was not noted."""

    kind: Literal["flat", "ivf", "hnsw"]
    dim: Positive
    structure: bool
    rows: Positive
    options: dict[str, int]
    shards: list[Shard]
    run: str
    fingerprint: str
    root: str | None = None


class Hits(NamedTuple):
    """The k nearest items of each query, nearest first, equals by id; places left empty have the id -1.

    score: (Q, k) float64, cosine similarity; structure-aware: adaptive distance.  id: (Q, k).
    """

    score: Tensor
    id: Tensor


class Item(NamedTuple):
    """As in items.parquet. path: below the root of the pictures."""

    id: int
    path: str | None
    label: str | None


class Index:
    """An open index. Processes of a machine share the memory that its files take."""

    def __init__(self, folder: Path, about: About, shards: Sequence[Any]):
        self.folder, self.about, self.shards = folder, about, shards
        self.offsets = np.cumsum([0, *(shard.rows for shard in about.shards[:-1])]).tolist()
        self.file = parquet.ParquetFile(folder / "items.parquet")
        groups = [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]
        self.starts = np.cumsum([0, *groups[:-1]])
        self.group = lru_cache(GROUPS)(self.file.read_row_group)

    def search(self, vectors: Any, k: int = 10, structure: Any = None) -> Hits:
        """The k nearest items of queries, unit vectors (Q, D) in an array or tensor.

        structure: (Q, D) the queries' structure embeddings, for the structure-aware ranking; None: the plain one.
        ValueError for other shapes, and for structure where the index was not built for it.
        """
        z = torch.as_tensor(vectors, dtype=torch.float32)
        if k < 1 or z.ndim != 2 or z.shape[1] != self.about.dim:
            raise ValueError(f"k={k}, vectors {tuple(z.shape)}: k >= 1 and vectors (Q, {self.about.dim}) are needed")
        if structure is None:
            best = self._nearest(torch.cat([z, torch.zeros_like(z)], 1) if self.about.structure else z, k)
            return Hits(best.similarity, best.position)
        if not self.about.structure:
            raise ValueError(f"{self.folder}: not built with --structure")
        s = torch.as_tensor(structure, dtype=torch.float32)
        best = self._nearest(query_vectors(z, s), k)
        constant = (s.double() * z.double().square()).sum(1, keepdim=True)
        return Hits((constant - best.similarity).clamp(min=0).sqrt(), best.position)

    def _nearest(self, queries: Tensor, k: int) -> faiss_index.Neighbors:
        found = [faiss_index.search(shard, queries, k) for shard in self.shards]
        return faiss_index.merged(found, self.offsets, k)

    def items(self, ids: Sequence[int]) -> list[Item]:
        found = []
        for i in ids:
            group = int(np.searchsorted(self.starts, i, "right")) - 1
            row = self.group(group).slice(i - int(self.starts[group]), 1).to_pylist()[0]
            found.append(Item(**row))
        return found

    def ask(self, picture: bytes, k: int = 10, plain: bool = False) -> dict[str, Any]:
        """The k items nearest to an encoded picture: "ranking", "hits", and the "milliseconds" of embedding it and of
        the search.

        plain: not by structure, where the index has it. BadPicture where it cannot be read.
        """
        aware, model = self.about.structure and not plain, self.model
        started = perf_counter()
        query = model.vectors([picture])
        embedded = perf_counter()
        found = self.search(query["vector"], min(k, self.about.rows), query["structure"] if aware else None)
        items = self.items([i for i in found.id[0].tolist() if i >= 0])
        took = {"embed": 1000 * (embedded - started), "search": 1000 * (perf_counter() - embedded)}
        score = "distance" if aware else "similarity"
        scored = zip(items, found.score[0].tolist(), strict=False)
        hits = [{"place": place, score: value, **item._asdict()} for place, (item, value) in enumerate(scored, 1)]
        return {"ranking": "structure-aware" if aware else "plain", "milliseconds": took, "hits": hits}

    @cached_property
    def model(self) -> Embedder:
        """What embeds queries as the items were. ValueError where it is damaged, or another."""
        model = Embedder(self.folder / "model")
        if model_fingerprint(self.folder / "model") != self.about.fingerprint:
            raise ValueError(f"{self.folder}/model: not the model that embedded the items")
        return model


def open_index(folder: str | Path, verify: bool = True) -> Index:
    """An index, to be asked again and again. ValueError where there is none or a shard is damaged.

    verify: read every shard once to compare its sha256; else they are read where a search looks.
    """
    root = Path(folder)
    try:
        about = About.model_validate_json((root / "index.json").read_bytes())
    except OSError:
        raise ValueError(f"{folder}: not an index: there is no index.json in it") from None
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(map(str, wrong["loc"]))
        raise ValueError(f"{folder}/index.json: {key}={wrong['input']!r}: {wrong['msg']}") from None
    shards = []
    for shard in about.shards:
        path = root / shard.name
        if not path.is_file() or (verify and sha256(path) != shard.sha256):
            raise ValueError(f"{path}: missing or damaged; its sha256 is not the one in index.json")
        shards.append(faiss_index.mapped(str(path)))
        if (shards[-1].ntotal, shards[-1].d) != (shard.rows, about.dim * (1 + about.structure)):
            raise ValueError(f"{path}: not of the size that index.json tells")
    return Index(root, about, shards)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def search_index(folder: str, image: Path, k: int, plain: bool) -> dict[str, Any]:
    """What `dml index search --json` prints: the items nearest to a picture. plain: not the structure-aware ranking."""
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
