"""`dml embed`: pictures to a file of vectors."""

from typing import Annotated

import typer

from pipelines.cli.arguments import Json, KeyValues, Run
from pipelines.cli.endings import exit_on_error, print_result
from pipelines.console import messages, stage


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

    Example: dml embed models:/dml-glyphs/1 --images PICTURES --out vectors.parquet
    """
    with exit_on_error():
        from pipelines.config.recipe import parse_assignments

        values = parse_assignments(assignments or [])
        with stage(messages, "starting"):
            from pipelines.serving.embed import plan_embedding, write_embeddings
        plan = plan_embedding(run, images, values, messages)
        facts = write_embeddings(plan, out, messages)
    print_result(
        as_json,
        facts,
        f"{facts['rows']:,} pictures in {facts['seconds']:.0f} s: {facts['file']}",
        f"next:  dml index build {facts['file']} --out INDEX",
    )
