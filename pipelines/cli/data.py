"""`dml data`: the data sets, and what is wrong with one."""

from typing import Annotated

import typer
from rich.text import Text

from pipelines.cli.arguments import Json
from pipelines.cli.endings import exit_on_error, print_result
from pipelines.console import messages

app = typer.Typer(no_args_is_help=True, help="Data sets. Example: dml data list")


@app.command("list")
def data_list(as_json: Json = False) -> None:
    """List the data sets and where they come from. Example: dml data list"""
    from pipelines.data.sets import describe_sets

    descriptions = describe_sets()
    print_result(as_json, descriptions, *(f"{name:<10} {text}" for name, text in descriptions.items()))


@app.command("check")
def data_check(
    name: Annotated[str, typer.Argument(help="A data set, see dml data list")],
    assignments: Annotated[
        list[str] | None, typer.Argument(metavar="root=DIR [KEY=VALUE]...", show_default=False)
    ] = None,
    pictures: Annotated[bool, typer.Option(help="Also read every picture.")] = True,
    as_json: Json = False,
) -> None:
    """Count a set's classes and images, and read every picture. Ends with 1 if something is wrong.

    Example: dml data check cub root=data/CUB
    """
    with exit_on_error():
        from pipelines.config.recipe import data_section
        from pipelines.data.check import check_set

        facts = check_set(data_section(name, assignments or []), pictures, messages)
    counts = [f"{key:<20} {count:>9,}" for key, count in facts["counts"].items()]
    counts.append(f"{'digest':<20} {facts['digest']}")
    problems = [Text(problem, "red") for problem in facts["problems"]]
    all_well = "nothing wrong" if pictures else "the counts are right; the pictures were not read"
    notes = [Text(note, "yellow") for note in facts["notes"]]
    print_result(as_json, facts, *counts, *notes, *(problems or [Text(all_well)]))
    if problems:
        raise typer.Exit(1)
