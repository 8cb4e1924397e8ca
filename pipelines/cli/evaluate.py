"""`dml evaluate`: test metrics of a trained model."""

from typing import Annotated

import typer

from pipelines.cli.arguments import Json, KeyValues, Run
from pipelines.cli.endings import exit_on_error, print_result
from pipelines.cli.tables import describe_evaluation
from pipelines.console import messages


def evaluate(
    run: Run,
    assignments: KeyValues = None,
    *,
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE.parquet", help="A new file for a row of each query: scores, ten nearest pictures."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Test metrics of a trained model, on its own test classes or on all pictures of another set.

    Example: dml evaluate models:/dml-glyphs/1 data.name=folder data.root=PICTURES --out queries.parquet
    """
    with exit_on_error():
        from pipelines.config.recipe import parse_assignments
        from pipelines.runs.evaluate import evaluate_run

        evaluation = evaluate_run(run, parse_assignments(assignments or []), messages, out)
    print_result(as_json, evaluation, *describe_evaluation(evaluation))
