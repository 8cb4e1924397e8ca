"""How an index comes to be: Ray's tasks on any node build a shard each, on one CPU, hence the same bits every time."""

import os
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import ray
import torch
from pyarrow import parquet
from rich.console import Console

from dml_core.retrieval import index as faiss_index
from dml_core.retrieval.index import KINDS, Options
from dml_core.retrieval.structure import index_vectors
from pipelines.cluster.session import open_cluster
from pipelines.config import sections
from pipelines.console import RunFailed
from pipelines.models.checkpoint import copy_model, model_fingerprint, read_config
from pipelines.models.find import find_checkpoint
from pipelines.serving import index
from pipelines.serving.embed import plan_embedding, write_embeddings
from pipelines.serving.index import About, Shard
from pipelines.serving.vectors_file import Embeddings

ITEMS = pa.schema([("id", pa.int64()), ("path", pa.string()), ("label", pa.string())])


class IndexRequest(NamedTuple):
    """An index to be built. structure: for the structure-aware ranking, too.  shard_rows: most that a shard holds."""

    kind: str
    structure: bool
    shard_rows: int
    options: Options

    def check(self, rows: int, structure: bool, source: str) -> None:
        """ValueError for what cannot be built of so many rows, with or without structure embeddings, of a source."""
        if self.kind not in KINDS:
            raise ValueError(f"--kind {self.kind}: there is no such kind{sections.nearest(self.kind, [*KINDS])}")
        if self.structure and not structure:
            raise ValueError(f"--structure: {source} has no structure embeddings; they come with namr in method=[...]")
        for name, value in {"shard_rows": self.shard_rows, **self.given()}.items():
            option = f"--{name.replace('_', '-')} {value}"
            if value < 1:
                raise ValueError(f"{option}: must be at least 1")
            if name in Options._fields and name not in KINDS[self.kind]:
                raise ValueError(f"{option} cannot act on --kind {self.kind}")
        least = min(map(len, self.shards(rows)))
        if (cells := self.options.nlist or 1) > least:
            raise ValueError(f"--nlist {cells}: a shard of {least} rows has no more than {least} cells")

    def given(self) -> dict[str, int]:
        return {name: value for name, value in self.options._asdict().items() if value is not None}

    def shards(self, rows: int) -> list[range]:
        """As few as hold all rows, as equal as can be."""
        count = -(-rows // self.shard_rows)
        return [range(i * rows // count, (i + 1) * rows // count) for i in range(count)]


def build_index(
    source: str,
    out: str,
    wanted: IndexRequest,
    model: str | None,
    assignments: dict[str, Any],
    console: Console,
    own: Literal["own", "test"] = "own",
) -> dict[str, Any]:
    """Write an index. Returns what `dml index build --json` prints.

    source: a file of dml embed, or a run, whose own set is then embedded first.  out: the index's folder, which must be
    new or empty; seen by all nodes.  model: of a file, where the run that made it is now.  assignments: config values
    for embedding.  own: of a run, its whole set or its test pictures.
    ValueError: bad input, before any worker starts. launch.RunFailed: on the way; then nothing is left of it.
    """
    folder = Path(out).expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out {out}: it exists already; remove it or choose another name")
    plan = None
    if source.endswith(".parquet"):
        file = source if "://" in source else str(Path(source).expanduser().resolve())
        if assignments:
            raise ValueError(f"{', '.join(assignments)} cannot act: the pictures of {source} are embedded already")
        embeddings = Embeddings(file)
        wanted.check(embeddings.rows, embeddings.structure, source)
        found = _model(source, embeddings.model, model)
        config = read_config(found)
    else:
        if model:
            raise ValueError(f"--model {model} cannot act: {source} is a run itself")
        plan = plan_embedding(source, None, assignments, console, own)
        wanted.check(plan.rows, plan.config.namr is not None, source)
        found, config, file = plan.checkpoint, plan.config, str(folder / "embeddings.parquet")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written to ({error})") from None
    try:
        with open_cluster(config, None):
            if plan:
                write_embeddings(plan, file, console)
            about = _write(Embeddings(file), file, found, folder, wanted, console)
        if plan:
            Path(file).unlink()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return {"index": str(folder), **about.model_dump()}


def _model(source: str, made_by: dict[str, str], named: str | None) -> Path:
    """The checkpoint that made a file."""
    for run in [named] if named else [made_by["checkpoint"], made_by["run"]]:
        try:
            found = find_checkpoint(run)
        except ValueError:
            continue
        if model_fingerprint(found) == made_by["fingerprint"]:
            return found
    where = named or made_by["checkpoint"]
    raise ValueError(f"{source}: the model that made it is not at {where}; --model RUN tells where it is")


def _write(
    embeddings: Embeddings, file: str, model: Path, folder: Path, wanted: IndexRequest, console: Console
) -> About:
    parts = {f"shard-{n:05d}.faiss": rows for n, rows in enumerate(wanted.shards(embeddings.rows))}
    try:
        waiting = [shard.remote(file, rows, wanted, str(folder / name)) for name, rows in parts.items()]
        with console.status(f"building {len(waiting)} shards"):
            hashes = ray.get(waiting)
    except ray.exceptions.RayError as error:
        raise RunFailed(str(error).strip().splitlines()[-1]) from error
    with parquet.ParquetWriter(folder / "items.parquet", ITEMS) as items:
        for first, table in embeddings.tables(["path", "label"]):
            ids = pa.array(range(first, first + len(table)), pa.int64())
            items.write_table(pa.table([ids, table["path"], table["label"]], schema=ITEMS))
    copy_model(model, folder / "model")
    about = About(
        kind=wanted.kind,  # type: ignore[arg-type]
        dim=embeddings.dim,
        structure=wanted.structure,
        rows=embeddings.rows,
        options=wanted.given(),
        shards=[
            Shard(name=name, rows=len(rows), sha256=hash_)
            for (name, rows), hash_ in zip(parts.items(), hashes, strict=True)
        ],
        run=embeddings.model["run"],
        fingerprint=embeddings.model["fingerprint"],
        root=embeddings.root,
    )
    (folder / "index.json.partial").write_text(about.model_dump_json(indent=1))
    os.replace(folder / "index.json.partial", folder / "index.json")
    return about


@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
def shard(file: str, rows: range, wanted: IndexRequest, path: str) -> str:
    """Write the shard of some rows of a file of embeddings. Returns its sha256."""
    import faiss

    faiss.omp_set_num_threads(1)
    vectors = torch.from_numpy(Embeddings(file).vectors(rows.start, rows.stop))
    stored = index_vectors(vectors) if wanted.structure else vectors
    faiss_index.write(faiss_index.build(stored, wanted.kind, wanted.options), path)
    return index.sha256(Path(path))
