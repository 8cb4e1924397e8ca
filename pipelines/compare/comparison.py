"""The whole of `dml compare`: read runs from MLflow, compare them, write the page, keep page and numbers in MLflow."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.compare.page import QueriesContent, render_comparison
from pipelines.compare.queries import QueryComparison
from pipelines.compare.statistics import METRICS, Comparison, compare_runs
from pipelines.pages.render import made_by
from pipelines.tracking.address import default_uri
from pipelines.tracking.runs import log_page, read_runs, read_text
from pipelines.tracking.server import prepare_store

NUMBERS_FILE = "comparison.json"  # an artifact of the MLflow run that holds a comparison's page


class ComparisonOutcome(NamedTuple):
    """A comparison, and where it is kept.

    Attributes:
        comparison: What it says.
        run_id: The MLflow run that holds its page and numbers; None where they are not kept.
        queries: What it says query by query, where that was asked for.
    """

    comparison: Comparison
    run_id: str | None
    queries: QueryComparison | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what `dml compare --json` prints."""
        return _numbers(self.comparison, self.queries) | ({} if self.run_id is None else {"run_id": self.run_id})


def compare_experiments(
    names: Sequence[str],
    baseline: str | None = None,
    metrics: Sequence[str] = METRICS,
    html: Path | None = None,
    log: bool = True,
) -> ComparisonOutcome:
    """Compare logged runs by config, over their seeds.

    Args:
        names: MLflow run ids and experiments.
        baseline: Part of a config's label, or the name or id of a run of it. None: the config without methods.
        metrics: Names of metrics.
        html: A file to write the page to.
        log: Keep the page and the numbers in MLflow, in the baseline's experiment.

    Raises:
        ValueError: A name is neither a run nor an experiment, there is nothing to compare, or not exactly one such
            baseline.
    """
    require_writable(html)
    uri = default_uri(Path.cwd())
    prepare_store(uri)
    comparison = compare_runs(read_runs(uri, names), " ".join(names), baseline, metrics)
    return publish(uri, " and ".join(names), comparison, html, log)


def require_writable(html: Path | None) -> None:
    """Raise ValueError where the page cannot be written."""
    if html and (html.is_dir() or not os.access(html.absolute().parent, os.W_OK)):
        raise ValueError(f"--html {html}: not a file in a folder that can be written to")


def publish(
    uri: str,
    title: str,
    comparison: Comparison,
    html: Path | None,
    log: bool,
    queries: QueryComparison | None = None,
    content: QueriesContent | None = None,
) -> ComparisonOutcome:
    """Write a comparison's page, and keep page and numbers in MLflow.

    Args:
        uri: MLflow's store.
        title: What is compared.
        comparison: Over seeds.
        html: A file to write the page to.
        log: Keep the page and the numbers in MLflow, in the baseline's experiment.
        queries: Query by query, where that was asked for.
        content: What the page shows of it.
    """
    known = bool(comparison.experiment)
    if log and not known:
        comparison.warnings.append("not kept in MLflow, which does not know the baseline's run")
    page = render_comparison(f"Comparison of {title}", comparison, made_by("dml compare"), content)
    if html:
        html.write_text(page, encoding="utf-8")
    run_id = keep_comparison(uri, comparison, "comparison.html", page, queries) if log and known else None
    return ComparisonOutcome(comparison, run_id, queries)


def keep_comparison(
    uri: str, comparison: Comparison, name: str, page: str, queries: QueryComparison | None = None
) -> str:
    """Keep a comparison's page, as an artifact of that name, and its numbers in MLflow.

    Returns:
        Id of the new run, in the baseline's experiment, that holds them.
    """
    texts = {name: page, NUMBERS_FILE: json.dumps(_numbers(comparison, queries), indent=1)}
    return log_page(uri, comparison.experiment, "comparison", texts)


def _numbers(comparison: Comparison, queries: QueryComparison | None) -> dict[str, Any]:
    return comparison.to_json() | ({} if queries is None else {"queries": queries.to_json()})


def read_comparison(uri: str, run_id: str) -> Comparison:
    """Read the numbers that keep_comparison has put into a run; of those query by query only that there are some."""
    numbers = json.loads(read_text(uri, run_id, NUMBERS_FILE))
    comparison = Comparison.from_json(numbers)
    if "queries" in numbers:
        comparison.warnings.append(f"the part query by query is left out: comparison.html of run {run_id} shows it")
    return comparison
