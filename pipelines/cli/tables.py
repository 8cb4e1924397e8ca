"""Results as tables on a terminal."""

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from pipelines.compare.wording import METRIC_COLUMNS, RANKINGS

if TYPE_CHECKING:
    from pipelines.runs.outcome import TrainOutcome
    from pipelines.sweeps.records import SweepOutcome


def trained(output: Console, outcome: "TrainOutcome") -> None:
    output.print(retrieval(f"Retrieval on unseen classes: {outcome.experiment}", outcome.metrics))
    _tell(
        output,
        f"run {outcome.run_id} ({outcome.name}), best epoch {outcome.metrics['best_epoch']:.0f}, "
        f"{outcome.seconds:.0f} s, {outcome.images_per_second:,.0f} images/s",
        f"checkpoint {outcome.checkpoint}",
        f"model {outcome.model}\n",
        "next:  dml ui                       curves and comparisons in MLflow",
        f"       dml evaluate {outcome.run_id}",
        f"       dml compare {outcome.experiment:<20} after more runs, by other seeds or settings",
    )


def evaluated(output: Console, found: dict[str, Any]) -> None:
    output.print(retrieval(found["checkpoint"], found["metrics"]))
    if unmatched := found["metrics"]["test/queries_without_match"]:
        _tell(output, f"{unmatched:.0f} queries have no other image of their class and are left out")


def tuned(output: Console, outcome: "SweepOutcome") -> None:
    sweep(output, outcome.sweep, outcome.trials)
    comparison(output, "default settings", outcome.tested, outcome.warnings)
    _tell(
        output,
        f"sweep {outcome.run_id}, {outcome.seconds:.0f} s",
        f"winner {outcome.recipe}",
        f"model {outcome.model + ', alias champion' if outcome.model else 'not registered'}\n",
        "next:  dml ui                       trials and plots in MLflow",
        f"       dml train {outcome.recipe} seed=1",
    )


def _tell(output: Console, *lines: str) -> None:
    """Whole lines, so that what they name can be copied."""
    output.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def retrieval(title: str, metrics: dict[str, float]) -> Table:
    """A line for each way of retrieving that there is, in percent."""
    table = Table(title=title)
    table.add_column("")
    for column in METRIC_COLUMNS.values():
        table.add_column(column, justify="right")
    for prefix, way in RANKINGS.items():
        if f"{prefix}/map_at_r" in metrics:
            table.add_row(way, *(f"{100 * metrics[f'{prefix}/{key}']:.1f}" for key in METRIC_COLUMNS))
    return table


def comparison(output: Console, baseline: str, lines: list[dict[str, Any]], warnings: list[str]) -> None:
    from pipelines.compare import wording
    from pipelines.compare.wording import TABLE_HEADS, Line

    table = Table(title=f"baseline: {baseline}")
    for head in TABLE_HEADS:
        table.add_column(head, overflow="fold")
    for line in lines:
        table.add_row(*wording.cells(Line(**line)))
    output.print(table)
    for warning in warnings:
        output.print(warning, style="yellow", highlight=False, markup=False)


def sweep(output: Console, name: str, trials: list[dict[str, Any]]) -> None:
    """The ten best trials, and why those that failed did."""
    from pipelines.compare.wording import short_number
    from pipelines.config import schema

    ranked = sorted(trials, key=lambda trial: -(trial["score"] or 0.0))
    table = Table(title=f"{name}: val/map_at_r of {len(ranked)} trials")
    for head in ("trial", "score", "epochs", "", "settings"):
        table.add_column(head, overflow="fold")
    for trial in ranked[:10]:
        settings = " ".join(
            f"{key}={short_number(str(value))}" for key, value in schema.flatten(trial["point"]).items()
        )
        score = "" if trial["score"] is None else f"{trial['score']:.4f}"
        table.add_row(trial["name"], score, str(trial["epochs"]), trial["ended"], settings)
    output.print(table)
    for trial in (trial for trial in ranked if trial["ended"] == "failed"):
        output.print(f"{trial['name']} failed: {trial['reason']}", style="yellow", highlight=False, markup=False)
