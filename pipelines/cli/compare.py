"""`dml compare`: whether a gain is real."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.arguments import Json
from pipelines.cli.endings import exit_on_error, print_result
from pipelines.cli.tables import describe_comparison
from pipelines.console import messages, stage


def compare(
    runs: Annotated[list[str], typer.Argument(help="MLflow run ids and experiments", metavar="RUN|EXPERIMENT...")],
    baseline: Annotated[
        str | None, typer.Option(help="Part of a config's label, or a run of it. Default: the one without methods.")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Default: test/recall_at_1 and test/map_at_r.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with every run as a point.")] = None,
    log: Annotated[bool, typer.Option(help="Keep the page and the numbers in MLflow.")] = True,
    as_json: Json = False,
) -> None:
    """Whether a gain is real: mean, interval and paired difference over seeds, by config.

    Example: dml compare glyphs --baseline method=[] --html gain.html
    """
    with exit_on_error(), stage(messages, "reading the runs"):
        from pipelines.compare.comparison import compare_experiments
        from pipelines.compare.statistics import METRICS

        outcome = compare_experiments(runs, baseline, metric or METRICS, html, log)
    comparison = outcome.comparison
    parts = describe_comparison(comparison.baseline, comparison.lines, comparison.warnings)
    print_result(as_json, outcome.to_json(), *parts)
