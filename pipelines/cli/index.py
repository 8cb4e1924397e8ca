"""`dml index`: build a Faiss index of pictures, and search it."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.arguments import Json, KeyValues
from pipelines.cli.endings import exit_on_error, print_result
from pipelines.cli.tables import describe_hits
from pipelines.console import messages, stage

app = typer.Typer(
    no_args_is_help=True,
    help="Nearest pictures by a trained model. Example: dml index search INDEX --image query.jpg",
)


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
    with exit_on_error():
        from pipelines.config.recipe import parse_assignments

        values = parse_assignments(assignments or [])
        with stage(messages, "starting"):
            from dml_core.retrieval.index import IndexOptions
            from pipelines.serving.index_build import IndexRequest, build_index
        request = IndexRequest(kind, structure, shard_rows, IndexOptions(nlist, nprobe, links, ef_search))
        facts = build_index(source, out, request, model, values, messages)
    print_result(
        as_json,
        facts,
        f"{facts['rows']:,} rows in {len(facts['shards'])} shards: {facts['index']}",
        f"next:  dml index search {facts['index']} --image PICTURE",
    )


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
    with exit_on_error(), stage(messages, "searching"):
        from pipelines.serving.index import search_index

        facts = search_index(folder, image, k, plain)
    print_result(as_json, facts, *describe_hits(image, facts))
