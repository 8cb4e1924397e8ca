"""`dml data`: the data sets, and what is wrong with one."""

import json
from typing import Annotated

import typer
from rich.console import Console

from pipelines.cli.arguments import Json
from pipelines.cli.endings import exit_on_error
from pipelines.console import messages

app = typer.Typer(no_args_is_help=True, help="Data sets. Example: dml data list")


@app.command("list")
def data_list(as_json: Json = False) -> None:
    """List the data sets and where they come from. Example: dml data list"""
    from dml_core.data.benchmarks import BENCHMARKS

    known = {
        "glyphs": "embedded: characters in the fonts of matplotlib, rendered at the first use",
        "folder": "your pictures, one folder a class: data.root=FOLDER, or a URL (s3://, gs://, abfs://)",
        "table": "your pictures, a CSV or Parquet file with path, label [, split] [, role]: data.table=FILE",
    }
    known |= {name: f"{b.title}: data.root=FOLDER; from {b.source}" for name, b in BENCHMARKS.items()}
    if as_json:
        print(json.dumps(known))
    else:
        for name, line in known.items():
            print(f"{name:<10} {line}")


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
        from pipelines.data import check

        report = check.check(data_section(name, assignments or []), pictures, messages)
    output = messages if as_json else Console()
    for key, count in report["counts"].items():
        output.print(f"{key:<20} {count:>9,}", highlight=False)
    for line in report["problems"]:
        output.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
    if not report["problems"]:
        output.print("nothing wrong" if pictures else "the counts are right; the pictures were not read")
    if as_json:
        print(json.dumps(report))
    if report["problems"]:
        raise typer.Exit(1)
