"""The whole of `dml compare`: read runs from MLflow, compare them, write the page, keep page and numbers in MLflow."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.compare.page import render_comparison
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
    """

    comparison: Comparison
    run_id: str | None

    def to_json(self) -> dict[str, Any]:
        """Return what `dml compare --json` prints."""
        return self.comparison.to_json() | ({} if self.run_id is None else {"run_id": self.run_id})


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
    uri = default_uri(Path.cwd())
    prepare_store(uri)
    comparison = compare_runs(read_runs(uri, names), " ".join(names), baseline, metrics)
    page = render_comparison(f"Comparison of {' and '.join(names)}", comparison, made_by("dml compare"))
    if html:
        html.write_text(page, encoding="utf-8")
    run_id = keep_comparison(uri, comparison, "comparison.html", page) if log else None
    return ComparisonOutcome(comparison, run_id)


def keep_comparison(uri: str, comparison: Comparison, name: str, page: str) -> str:
    """Keep a comparison's page, as an artifact of that name, and its numbers in MLflow.

    Returns:
        Id of the new run, in the baseline's experiment, that holds them.
    """
    texts = {name: page, NUMBERS_FILE: json.dumps(comparison.to_json(), indent=1)}
    return log_page(uri, comparison.experiment, "comparison", texts)


def read_comparison(uri: str, run_id: str) -> Comparison:
    """Read the numbers that keep_comparison has put into a run."""
    return Comparison.from_json(json.loads(read_text(uri, run_id, NUMBERS_FILE)))
