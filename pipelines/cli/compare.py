"""`dml compare`: whether a gain is real."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.arguments import Json
from pipelines.cli.endings import exit_on_error, print_result
from pipelines.cli.tables import describe_comparison, describe_queries
from pipelines.console import messages, stage


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="MLflow run ids and experiments; with --queries also checkpoint folders, models:/NAME@ALIAS, and "
            "KEY=VALUE that say where the pictures are now",
            metavar="RUN|EXPERIMENT...",
        ),
    ],
    baseline: Annotated[
        str | None, typer.Option(help="Part of a config's label, or a run of it. Default: the one without methods.")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Default: test/recall_at_1 and test/map_at_r.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with every run as a point.")] = None,
    queries: Annotated[
        bool,
        typer.Option(
            "--queries", help="Also query by query: who wins, in which classes, and would other classes say so."
        ),
    ] = False,
    log: Annotated[bool, typer.Option(help="Keep the page and the numbers in MLflow.")] = True,
    as_json: Json = False,
) -> None:
    """Whether a gain is real: mean, interval and paired difference over seeds, by config.

    Example: dml compare glyphs --baseline method=[] --queries --html gain.html
    """
    with exit_on_error():
        from pipelines.compare.statistics import METRICS

        if queries:
            from pipelines.config.recipe import parse_assignments

            with stage(messages, "starting"):
                from pipelines.reports.queries import compare_by_queries

            names = [run for run in runs if "=" not in run]
            assignments = parse_assignments([run for run in runs if "=" in run])
            if not names:
                raise ValueError("a run or an experiment is needed")
            outcome = compare_by_queries(names, assignments, baseline, metric or METRICS, html, log)
        else:
            from pipelines.compare.comparison import compare_experiments

            with stage(messages, "reading the runs"):
                outcome = compare_experiments(runs, baseline, metric or METRICS, html, log)
    comparison = outcome.comparison
    parts = describe_comparison(comparison.baseline, comparison.lines, comparison.warnings)
    if outcome.queries:
        parts += describe_queries(outcome.queries)
    print_result(as_json, outcome.to_json(), *parts)
