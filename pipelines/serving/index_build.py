"""Build an index: tasks of Ray on any node build a shard each, on one CPU, hence the same bits every time.

Where there is no cluster, and but one shard, this process builds it.
"""

import logging
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import pyarrow as pa
import torch
from pyarrow import parquet
from rich.console import Console

from dml_core.retrieval import index as faiss_index
from dml_core.retrieval.index import KINDS, IndexOptions
from dml_core.retrieval.structure import index_vectors
from pipelines.cluster.devices import has_cluster, needs_ray
from pipelines.cluster.failures import call_interruptibly
from pipelines.config import sections
from pipelines.config.schema import Config
from pipelines.console import RunFailed, stage
from pipelines.files import write_atomically
from pipelines.models.checkpoint import copy_model, model_fingerprint, read_config
from pipelines.models.find import find_checkpoint
from pipelines.serving.embed import EmbeddingPlan, plan_embedding, write_embeddings
from pipelines.serving.index import About, IndexKind, Shard, hash_file
from pipelines.serving.vectors_file import Embeddings, ModelOrigin

ITEM_COLUMNS = pa.schema([("id", pa.int64()), ("path", pa.string()), ("label", pa.string())])


class IndexRequest(NamedTuple):
    """An index to be built.

    Attributes:
        kind: Of KINDS.
        structure: Make it rank by structure, too.
        shard_rows: Most rows that a shard holds.
        options: Of Faiss.
    """

    kind: str = "flat"
    structure: bool = False
    shard_rows: int = 250_000
    options: IndexOptions = IndexOptions()

    def check(self, rows: int, structure: bool, source: str) -> None:
        """Check that the index can be built.

        Args:
            rows: Number of its items.
            structure: Whether they have structure embeddings.
            source: Where they come from, for the message.

        Raises:
            ValueError: It cannot.
        """
        if self.kind not in KINDS:
            raise ValueError(f"--kind {self.kind}: there is no such kind{sections.nearest(self.kind, [*KINDS])}")
        if self.structure and not structure:
            raise ValueError(f"--structure: {source} has no structure embeddings; they come with namr in method=[...]")
        for name, value in {"shard_rows": self.shard_rows, **self.chosen_options()}.items():
            option = f"--{name.replace('_', '-')} {value}"
            if value < 1:
                raise ValueError(f"{option}: must be at least 1")
            if name in IndexOptions._fields and name not in KINDS[self.kind]:
                raise ValueError(f"{option} cannot act on --kind {self.kind}")
        least = min(map(len, self.split(rows)))
        if (cells := self.options.nlist or 1) > least:
            raise ValueError(f"--nlist {cells}: a shard of {least} rows has no more than {least} cells")

    def chosen_options(self) -> dict[str, int]:
        """Return the options that are not left to their defaults."""
        return {name: value for name, value in self.options._asdict().items() if value is not None}

    def split(self, rows: int) -> list[range]:
        """Split rows into as few shards as hold them all, as equal as can be."""
        count = -(-rows // self.shard_rows)
        return [range(i * rows // count, (i + 1) * rows // count) for i in range(count)]


class _Source(NamedTuple):
    """Where an index's vectors come from.

    Attributes:
        file: Of embeddings.
        model: The checkpoint folder of the model that embedded them.
        config: What a cluster is opened for.
        rows: How many vectors there are.
        plan: Set where the file must be written first.
    """

    file: str
    model: Path
    config: Config
    rows: int
    plan: EmbeddingPlan | None


def build_index(
    source: str,
    out: str,
    request: IndexRequest,
    model: str | None,
    assignments: Mapping[str, Any],
    console: Console,
    own: Literal["own", "test"] = "own",
) -> dict[str, Any]:
    """Build an index of a file of embeddings, or of a run's pictures, which are then embedded first.

    Args:
        source: A file of `dml embed`, or a run, see models.find.find_checkpoint.
        out: The index's folder, which must be new or empty, and which all nodes see.
        request: What to build.
        model: Of a file, where the run that embedded it is now; None: where it was.
        assignments: Of a run, config values for embedding, nested or by dotted keys.
        console: Where progress is shown.
        own: Of a run, its whole set or its test pictures.

    Returns:
        What `dml index build --json` prints: the fields of About, and the folder as "index".

    Raises:
        ValueError: Bad input, before any worker starts.
        RunFailed: Workers failed; nothing is left of the index.
    """
    folder = Path(out).expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out {out}: it exists already; remove it or choose another name")
    if source.endswith(".parquet"):
        vectors = _open_file(source, request, model, assignments)
    else:
        if model:
            raise ValueError(f"--model {model} cannot act: {source} is a run itself")
        plan = plan_embedding(source, None, assignments, console, own)
        request.check(plan.rows, plan.model.config.namr is not None, source)
        config = plan.model.config
        vectors = _Source(str(folder / "embeddings.parquet"), plan.model.checkpoint, config, plan.rows, plan)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written to ({error})") from None
    try:
        about = _embed_and_build(vectors, folder, request, console)
        if vectors.plan:
            Path(vectors.file).unlink()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return {"index": str(folder), **about.model_dump()}


def _open_file(source: str, request: IndexRequest, model: str | None, assignments: Mapping[str, Any]) -> _Source:
    """Check that an index can be built of a file, and find the model that embedded it."""
    file = source if "://" in source else str(Path(source).expanduser().resolve())
    if assignments:
        raise ValueError(f"{', '.join(assignments)} cannot act: the pictures of {source} are embedded already")
    embeddings = Embeddings(file)
    request.check(embeddings.rows, embeddings.structure, source)
    checkpoint = _find_model(source, embeddings.model, model)
    return _Source(file, checkpoint, read_config(checkpoint), embeddings.rows, None)


def _find_model(source: str, origin: ModelOrigin, named: str | None) -> Path:
    """Find the checkpoint of the model that embedded a file: under the given name, or where it was."""
    for run in [named] if named else [origin["checkpoint"], origin["run"]]:
        try:
            checkpoint = find_checkpoint(run)
        except ValueError:  # the next one, or the message below
            logging.getLogger(__name__).debug("the model of %s is not at %s", source, run, exc_info=True)
            continue
        if model_fingerprint(checkpoint) == origin["fingerprint"]:
            return checkpoint
    where = named or origin["checkpoint"]
    raise ValueError(f"{source}: the model that made it is not at {where}; --model RUN tells where it is")


def _embed_and_build(source: _Source, folder: Path, request: IndexRequest, console: Console) -> About:
    """Write the embeddings, if they are not there, and the index of them."""
    cluster: AbstractContextManager[None] = nullcontext()
    if (needs_ray(source.config) if source.plan else has_cluster()) or len(request.split(source.rows)) > 1:
        from pipelines.cluster.session import open_cluster

        cluster = open_cluster(source.config, None)
    with cluster:
        if source.plan:
            write_embeddings(source.plan, source.file, console)
        return _write_index(source, folder, request, console)


def _write_index(source: _Source, folder: Path, request: IndexRequest, console: Console) -> About:
    embeddings = Embeddings(source.file)
    ranges = {f"shard-{n:05d}.faiss": rows for n, rows in enumerate(request.split(embeddings.rows))}
    shards = [(source.file, rows, request, str(folder / name)) for name, rows in ranges.items()]
    with stage(console, f"building {len(shards)} shards"):
        if has_cluster():
            built = _build_in_cluster(shards)
        else:
            built = call_interruptibly(lambda: [_build_shard(*shard) for shard in shards])
    trained_on: Literal["cpu", "gpu"] | None = None
    if request.kind == "ivf":
        trained_on = "gpu" if all(shard.gpus for shard in built) else "cpu"
        by = "a GPU" if trained_on == "gpu" else "the processor, as Faiss sees no GPU"
        console.print(f"cells of ivf: trained by {by}", highlight=False)
    with parquet.ParquetWriter(folder / "items.parquet", ITEM_COLUMNS) as items:
        for first, table in embeddings.tables(["path", "label"]):
            ids = pa.array(range(first, first + len(table)), pa.int64())
            items.write_table(pa.table([ids, table["path"], table["label"]], schema=ITEM_COLUMNS))
    copy_model(source.model, folder / "model")
    about = About(
        kind=cast(IndexKind, request.kind),  # as IndexRequest.check has seen
        dim=embeddings.dim,
        structure=request.structure,
        rows=embeddings.rows,
        options=request.chosen_options(),
        shards=[
            Shard(name=name, rows=len(rows), sha256=shard.sha256)
            for (name, rows), shard in zip(ranges.items(), built, strict=True)
        ],
        trained_on=trained_on,
        run=embeddings.model["run"],
        fingerprint=embeddings.model["fingerprint"],
        root=embeddings.root,
    )
    write_atomically(folder / "index.json", about.model_dump_json(indent=1))
    return about


class _Built(NamedTuple):
    """A shard's file: its sha256, and how many GPUs Faiss saw in the process that built it."""

    sha256: str
    gpus: int


def _build_in_cluster(shards: list[tuple[str, range, IndexRequest, str]]) -> list[_Built]:
    """Build shards as tasks of Ray, on a GPU each where Faiss can train on it. Arguments as of _build_shard."""
    import ray

    on_gpu = shards[0][2].kind == "ivf" and faiss_index.gpu_count() > 0 and ray.cluster_resources().get("GPU", 0) > 0
    build: Any = ray.remote(num_cpus=1, num_gpus=int(on_gpu), scheduling_strategy="SPREAD")(_build_shard)
    try:
        return ray.get([build.remote(*shard) for shard in shards])
    except ray.exceptions.RayError as error:
        raise RunFailed(str(error).strip().splitlines()[-1]) from error


def _build_shard(file: str, rows: range, request: IndexRequest, path: str) -> _Built:
    """Write the shard of some rows of a file of embeddings."""
    import faiss

    faiss.omp_set_num_threads(1)
    vectors = torch.from_numpy(Embeddings(file).vectors(rows.start, rows.stop))
    stored = index_vectors(vectors) if request.structure else vectors
    faiss_index.write(faiss_index.build(stored, request.kind, request.options), path)
    return _Built(hash_file(Path(path)), faiss_index.gpu_count())
