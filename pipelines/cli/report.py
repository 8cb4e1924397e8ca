"""`dml report`: one page of a run, a sweep or a comparison."""

from typing import Annotated

import typer

from pipelines.cli.arguments import Json
from pipelines.cli.endings import exit_on_error, print_result
from pipelines.console import messages, stage


def report(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|SWEEP|COMPARISON|EXPERIMENT... [KEY=VALUE]...",
            help="A run id, a checkpoint folder or models:/NAME@ALIAS; a sweep's run id or folder; a run id of dml "
            "compare's page, or the experiments to compare.",
            show_default=False,
        ),
    ],
    out: Annotated[str, typer.Option(metavar="FILE.html", help="The page; an older one is replaced.")],
    log: Annotated[bool, typer.Option(help="Keep the page in MLflow, as report.html of the run.")] = True,
    as_json: Json = False,
) -> None:
    """One page of a run: curves, neighbours, hardest errors, a map of the embedding, variation inside classes. Or of a
    sweep, or a comparison.

    Example: dml report models:/dml-glyphs/1 --out report.html
    """
    with exit_on_error():
        from pipelines.config.recipe import parse_assignments

        assignments = parse_assignments([name for name in names if "=" in name])
        subjects = [name for name in names if "=" not in name]
        if not subjects:
            raise ValueError("a run, a sweep, a comparison or an experiment is needed")
        with stage(messages, "starting"):
            from pipelines.reports.report import find_subject, output_path, write_report
        path = output_path(out)
        facts = write_report(find_subject(subjects, assignments, messages), path, log, messages)
    print_result(as_json, facts, f"{facts['report']}  ({facts['bytes'] / 1e6:.1f} MB, {facts['seconds']:.0f} s)")
