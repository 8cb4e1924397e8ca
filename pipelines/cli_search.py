"""`dml embed` and `dml index`: from a trained model to a search of your pictures."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pipelines.console import Json, in_words, messages

app = typer.Typer(
    no_args_is_help=True,
    help="Nearest pictures by a trained model. Example: dml index search INDEX --image query.jpg",
)
Run = Annotated[str, typer.Argument(help="An MLflow run id, a checkpoint folder, or models:/NAME@ALIAS")]
KeyValues = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)]


def embed(
    run: Run,
    assignments: KeyValues = None,
    *,
    images: Annotated[
        str | None,
        typer.Option(metavar="DIR|CSV|PARQUET", help="Pictures, with or without labels. Default: the run's own set."),
    ] = None,
    out: Annotated[str, typer.Option(metavar="FILE.parquet", help="A new file, here or in a bucket.")],
    as_json: Json = False,
) -> None:
    """Embed pictures with a trained model, on all workers, into a Parquet file of unit vectors.

    Example: dml embed models:/dml-glyphs/1 --images PICTURES --out vectors.parquet workers=2
    """
    with in_words():
        from pipelines import embed as e
        from pipelines.recipe import assigned

        made = e.embed(e.plan(run, images, assigned(assignments or []), messages), out, messages)
    told = f"{made['rows']:,} pictures in {made['seconds']:.0f} s: {made['file']}"
    _end(as_json, made, told, f"next:  dml index build {made['file']} --out INDEX")


@app.command("build")
def index_build(
    source: Annotated[str, typer.Argument(metavar="RUN|FILE.parquet", help="Of dml embed; a RUN's own set else.")],
    assignments: KeyValues = None,
    *,
    out: Annotated[str, typer.Option(metavar="DIR", help="A new folder, seen by all nodes.")],
    kind: Annotated[str, typer.Option(help="flat: exact; ivf, hnsw: faster, and nearly")] = "flat",
    structure: Annotated[bool, typer.Option("--structure", help="For structure-aware search, by NAMR.")] = False,
    shard_rows: Annotated[int, typer.Option(help="Most that a shard holds, and a task in its memory.")] = 250_000,
    nlist: Annotated[int | None, typer.Option(help="ivf: cells a shard. Default: sqrt(rows).")] = None,
    nprobe: Annotated[int | None, typer.Option(help="ivf: cells that a query looks into.")] = None,
    links: Annotated[int | None, typer.Option(help="hnsw: links of each item.")] = None,
    ef_search: Annotated[int | None, typer.Option(help="hnsw: candidates that a query holds.")] = None,
    model: Annotated[str | None, typer.Option(metavar="RUN", help="Of FILE.parquet, if it has moved.")] = None,
    as_json: Json = False,
) -> None:
    """Build a Faiss index from a file of dml embed, or from a run, whose own set is then embedded first.

    Example: dml index build vectors.parquet --out INDEX --kind hnsw
    """
    with in_words():
        from dml_core.retrieval.index import Options
        from pipelines import shards
        from pipelines.recipe import assigned

        wanted = shards.Wanted(kind, structure, shard_rows, Options(nlist, nprobe, links, ef_search))
        made = shards.build(source, out, wanted, model, assigned(assignments or []), messages)
    told = f"{made['rows']:,} rows in {len(made['shards'])} shards: {made['index']}"
    _end(as_json, made, told, f"next:  dml index search {made['index']} --image PICTURE")


@app.command("search")
def index_search(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Of dml index build")],
    image: Annotated[Path, typer.Option(metavar="FILE", help="The query.")],
    k: Annotated[int, typer.Option("-k", help="How many.")] = 10,
    plain: Annotated[bool, typer.Option("--plain", help="By cosine, where structure-aware is the default.")] = False,
    as_json: Json = False,
) -> None:
    """The pictures nearest to one, by the model of the index.

    Example: dml index search INDEX --image query.jpg -k 5
    """
    with in_words():
        from pipelines.index import search

        found = search(folder, image, k, plain)
    score = "similarity" if found["ranking"] == "plain" else "distance"
    table = Table(title=f"nearest to {image}, {found['ranking']}")
    for head in ("place", score):
        table.add_column(head, justify="right")
    for head in ("label", "path"):
        table.add_column(head, overflow="fold")
    for hit in found["hits"]:
        table.add_row(str(hit["place"]), f"{hit[score]:.4f}", hit["label"] or "", hit["path"] or f"id {hit['id']}")
    took = found["milliseconds"]
    _end(as_json, found, table, f"query embedded in {took['embed']:.1f} ms, searched in {took['search']:.1f} ms")


def _end(as_json: bool, made: dict[str, Any], *lines: str | Table) -> None:
    output = messages if as_json else Console()
    for line in lines:
        output.print(line, highlight=False, markup=False, soft_wrap=isinstance(line, str))
    if as_json:
        print(json.dumps(made))
