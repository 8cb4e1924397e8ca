"""Results as lines and tables for a terminal; endings.print_result prints them."""

import math
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from pipelines.compare.wording import (
    CLASS_HEADS,
    METRIC_COLUMNS,
    QUERY_HEADS,
    RANKINGS,
    TABLE_HEADS,
    Line,
    format_class,
    format_line,
    format_query_line,
    short_number,
)

if TYPE_CHECKING:
    from pipelines.compare.queries import QueryComparison
    from pipelines.runs.evaluate import Evaluation
    from pipelines.runs.outcome import TrainOutcome
    from pipelines.serving.index import SearchResult
    from pipelines.sweeps.records import SweepOutcome, Trial

Part = str | Text | Table

CLASSES = 4  # shown of those that lose most, and of those that gain most


def describe_training(outcome: "TrainOutcome") -> list[Part]:
    """What a run has reached, and what can be done next."""
    return [
        *describe_retrieval(f"Retrieval on unseen classes: {outcome.experiment}", outcome.metrics),
        f"run {outcome.run_id} ({outcome.name}), best epoch {outcome.metrics['best_epoch']:.0f}, "
        f"{outcome.seconds:.0f} s, {outcome.images_per_second:,.0f} images/s",
        f"checkpoint {outcome.checkpoint}",
        f"model {outcome.model}\n",
        "next:  dml ui                       curves and comparisons in MLflow",
        f"       dml evaluate {outcome.run_id}",
        f"       dml compare {shlex.quote(outcome.experiment):<20} after more runs, by other seeds or settings",
    ]


def describe_phases(outcome: "TrainOutcome") -> Table:
    """Where the seconds of a training went; the driver, Ray and the workers have phases that overlap."""
    table = Table(title=f"{outcome.name}: {outcome.seconds:.1f} s")
    table.add_column("")
    for head in ("from, s", "seconds", "share"):
        table.add_column(head, justify="right")
    for name, begun, seconds in sorted(outcome.phases, key=lambda phase: phase[1]):
        table.add_row(name, f"{begun:.1f}", f"{seconds:.1f}", f"{seconds / outcome.seconds:.0%}")
    return table


def describe_evaluation(evaluation: "Evaluation") -> list[Part]:
    """Test metrics of a checkpoint."""
    parts = describe_retrieval(evaluation["checkpoint"], evaluation["metrics"])
    if "out" in evaluation:
        parts.append(f"{evaluation['tested']['queries']:,} queries: {evaluation['out']} (pandas.read_parquet reads it)")
    return parts


def describe_retrieval(title: str, metrics: dict[str, float]) -> list[Part]:
    """Retrieval metrics as a table, and what of it is left out."""
    parts: list[Part] = [retrieval_table(title, metrics)]
    if unmatched := metrics.get("test/queries_without_match"):
        parts.append(
            f"{unmatched:.0f} of {metrics['test/queries']:.0f} queries have no match, which is another image of their "
            "class in the gallery, and are left out"
        )
    return parts


def retrieval_table(title: str, metrics: dict[str, float]) -> Table:
    """Retrieval metrics in percent, a row for each ranking that was measured, or a column where there are many metrics.

    Queries without a match are counted beside them, where there are any.
    """
    rankings = {prefix: ranking for prefix, ranking in RANKINGS.items() if f"{prefix}/map_at_r" in metrics}
    names = [name.partition("/")[2] for name in metrics if name.partition("/")[0] in rankings]
    counts = ("queries", "queries_without_match")
    columns = METRIC_COLUMNS | {name: name for name in names if name not in (*METRIC_COLUMNS, *counts)}
    unmatched = {prefix: metrics[f"{prefix}/queries_without_match"] for prefix in rankings}
    heads, texts = [*columns.values()], dict[str, list[str]]()
    for prefix, ranking in rankings.items():
        matched = unmatched[prefix] < metrics.get("test/queries", math.inf)
        values = [metrics.get(f"{prefix}/{name}") if matched else None for name in columns]
        texts[ranking] = ["" if value is None else f"{100 * value:.1f}" for value in values]
    if any(unmatched.values()):
        heads.append("without match")
        for prefix, ranking in rankings.items():
            texts[ranking].append(f"{unmatched[prefix]:.0f}")
    rows = [[ranking, *row] for ranking, row in texts.items()]
    if columns.keys() - METRIC_COLUMNS:
        heads, rows = [*texts], [[head, *row] for head, *row in zip(heads, *texts.values(), strict=True)]
    table = Table(title=title)
    table.add_column("")
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def describe_comparison(baseline: str, lines: Sequence[Line], warnings: Sequence[str]) -> list[Part]:
    """Configs beside their baseline, and what makes the comparison weaker than it looks."""
    table = Table(title=f"baseline: {baseline}")
    for head in TABLE_HEADS:
        table.add_column(head, overflow="fold")
    for line in lines:
        table.add_row(*format_line(line))
    return [table, *(Text(warning, "yellow") for warning in warnings)]


def describe_queries(queries: "QueryComparison") -> list[Part]:
    """Configs beside their baseline query by query, and for each the classes that move the metric most."""
    from pipelines.compare.queries import most_moved

    parts: list[Part] = []
    for group in dict.fromkeys(line.group for line in queries.lines):
        table = Table(title=f"query by query: {group}")
        for head in QUERY_HEADS[1:]:
            table.add_column(head, overflow="fold")
        for line in queries.lines:
            if line.group == group:
                table.add_row(*format_query_line(line)[1:])
        lost, won = most_moved(queries.classes, group, CLASSES)
        classes = Table(title="classes that lose and gain most in MAP@R")
        for head in CLASS_HEADS:
            classes.add_column(head, overflow="fold")
        for moved in [*lost, *reversed(won)]:
            classes.add_row(*format_class(moved))
        parts += [table, classes if lost or won else "no query has another score than with the baseline"]
    return [*parts, *(Text(warning, "yellow") for warning in queries.warnings)]


def describe_sweep(outcome: "SweepOutcome") -> list[Part]:
    """The trials of a sweep, its winner beside the defaults, and what can be done next."""
    return [
        *describe_trials(outcome.sweep, outcome.trials),
        *(describe_comparison("default settings", outcome.tested, outcome.warnings) if outcome.tested else ()),
        f"sweep {outcome.run_id}, {outcome.seconds:.0f} s",
        f"winner {outcome.recipe}",
        f"model {outcome.model + ', alias champion' if outcome.model else 'not registered'}\n"
        if outcome.tested
        else "nothing was tested (--final-seeds 0)\n",
        "next:  dml ui                       trials and plots in MLflow",
        f"       dml train {outcome.recipe} seed=1",
    ]


def describe_trials(sweep: str, trials: Sequence["Trial"]) -> list[Part]:
    """The ten best trials, and why those that failed did."""
    from pipelines.config import schema

    ranked = sorted(trials, key=lambda trial: -(trial.score or 0.0))
    table = Table(title=f"{sweep}: val/map_at_r of {len(ranked)} trials")
    for head in ("trial", "score", "epochs", "", "settings"):
        table.add_column(head, overflow="fold")
    for trial in ranked[:10]:
        settings = " ".join(f"{key}={short_number(str(value))}" for key, value in schema.flatten(trial.point).items())
        score = "" if trial.score is None else f"{trial.score:.4f}"
        table.add_row(trial.name, score, str(trial.epochs), trial.ended, settings)
    failed = [trial for trial in ranked if trial.ended == "failed"]
    return [table, *(Text(f"{trial.name} failed: {trial.reason}", "yellow") for trial in failed)]


def describe_hits(image: object, facts: "SearchResult") -> list[Part]:
    """The pictures nearest to a query."""
    table = Table(title=f"nearest to {image}, {facts['ranking']}")
    for head in ("place", "similarity" if facts["ranking"] == "plain" else "distance"):
        table.add_column(head, justify="right")
    for head in ("label", "path"):
        table.add_column(head, overflow="fold")
    for hit in facts["hits"]:
        score = hit["distance"] if "distance" in hit else hit["similarity"]
        table.add_row(str(hit["place"]), f"{score:.4f}", hit["label"] or "", hit["path"] or f"id {hit['id']}")
    took = facts["milliseconds"]
    return [table, f"query embedded in {took['embed']:.1f} ms, searched in {took['search']:.1f} ms"]
