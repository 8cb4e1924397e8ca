"""`dml evaluate`: test metrics of a trained model."""

import json
from typing import Annotated

import typer
from rich.console import Console

from pipelines.cli import tables
from pipelines.cli.arguments import Json
from pipelines.cli.endings import exit_on_error
from pipelines.console import messages


def evaluate(
    run: Annotated[str, typer.Argument(help="An MLflow run id, a checkpoint folder, or models:/NAME@ALIAS")],
    assignments: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Test metrics of a trained model, on its own test classes or on other data.

    Example: dml evaluate models:/dml-glyphs/1 workers=2
    """
    with exit_on_error():
        from pipelines.config.recipe import parse_assignments
        from pipelines.runs.evaluate import evaluate_run

        found = evaluate_run(run, parse_assignments(assignments or []), messages)
    output = messages if as_json else Console()
    tables.evaluated(output, found)
    if as_json:
        print(json.dumps(found))
