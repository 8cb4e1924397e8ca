"""`dml compare`: whether a gain is real."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pipelines.cli import tables
from pipelines.cli.arguments import Json
from pipelines.cli.endings import exit_on_error
from pipelines.console import messages


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
    from pipelines.compare.statistics import METRICS, compare_runs

    with exit_on_error():
        from pipelines.tracking.runs import log_page, read_runs
        from pipelines.tracking.server import default_uri, prepare_store

        uri = default_uri(Path.cwd())
        prepare_store(uri)
        found = compare_runs(read_runs(uri, runs), " ".join(runs), baseline, metric or METRICS)
        lines = [line._asdict() for line in found.lines]
        report: dict[str, Any] = {"baseline": found.baseline, "warnings": found.warnings, "lines": lines}
        if html:
            html.write_text(found.page)
        if log:
            texts = {"comparison.html": found.page, "comparison.json": json.dumps(report, indent=1)}
            report["run_id"] = log_page(uri, found.experiment, "comparison", texts)
    output = messages if as_json else Console()
    tables.comparison(output, found.baseline, lines, found.warnings)
    if as_json:
        print(json.dumps(report))
