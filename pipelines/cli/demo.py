"""`dml demo`: a page that searches by pictures."""

from typing import Annotated

import typer

from pipelines.cli.arguments import Json, KeyValues
from pipelines.cli.endings import exit_on_error, print_result
from pipelines.console import messages, stage


def demo(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN|INDEX",
            help="An MLflow run id, a checkpoint folder, or models:/NAME@ALIAS; or a folder of dml index build.",
        ),
    ],
    assignments: KeyValues = None,
    *,
    index: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Of dml index build. Default: one of the run's test pictures is built first."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0: any that is free.")] = 8080,
    as_json: Json = False,
) -> None:
    """A page, on this machine only, that shows the pictures nearest to one of yours. Ctrl-C ends it.

    Example: dml demo models:/dml-glyphs/1 --index INDEX
    """
    with exit_on_error():
        from pipelines.config.recipe import parse_assignments

        values = parse_assignments(assignments or [])
        with stage(messages, "starting"):
            try:
                from pipelines.serving import demo_page
            except ModuleNotFoundError as error:
                raise ValueError("dml demo: NiceGUI is not installed; pip install 'dml-ray[demo]'") from error
            from pipelines.serving.demo import open_demo

        with demo_page.listen(port) as socket, open_demo(run, index, values, messages) as demonstration:
            about = demonstration.index.about
            url = f"http://127.0.0.1:{socket.getsockname()[1]}"
            folder = str(demonstration.index.folder)
            facts = {"url": url, "index": folder, "rows": about.rows, "structure": about.structure}
            print_result(as_json, facts, f"{about.rows:,} pictures on {url}  (Ctrl-C ends it)")
            demo_page.serve(demonstration, socket)
