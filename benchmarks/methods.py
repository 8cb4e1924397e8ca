"""What each method adds to each base loss on unseen classes: `dml tune` searches, `dml compare` compares.

    python benchmarks/methods.py glyphs --budget 480
    python benchmarks/methods.py grocery-whole data.root=GroceryStoreDataset --budget 480

A cell of the table is a base loss with some methods. All cells have the same budget: the loss is searched alone first
(tune_spaces.base, twice `--samples` points over `--folds` folds of the training classes), and from the winner each cell
searches `--samples` points: the methods their own spaces, the loss alone the base space once more, and all methods
together their spaces, from what each has found alone. The winner of a cell is trained over `--seeds` seeds that no
search has used, and each run is tested once.

Everything is kept in ./runs and in MLflow's experiment `methods-RECIPE`. The same command goes on where it was
interrupted, by its `--budget` of minutes or otherwise; with more `--seeds` it adds them. Cells are taken in order of
interest: loss by loss, each alone and then with its methods. The table is printed with what it still lacks, and with
--write it replaces the one of docs/benchmarks.md.
"""

import argparse
import itertools
import math
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dml_core.cpus import usable_cpus
from pipelines.cli.endings import run_script
from pipelines.cluster.session import open_cluster
from pipelines.cluster.threads import torch_threads
from pipelines.compare.statistics import METRICS, compare_runs
from pipelines.compare.wording import Line, format_line
from pipelines.config import load
from pipelines.config.methods import METHODS
from pipelines.config.recipe import parse_assignments, read_stored_config
from pipelines.config.schema import flatten
from pipelines.console import QUIET, RunFailed, messages
from pipelines.kept import keep_between_runs
from pipelines.runs.train import run_training
from pipelines.sweeps.records import SweepOptions, SweepOutcome
from pipelines.sweeps.spaces import SPACES
from pipelines.sweeps.sweep import resume_sweep, start_sweep
from pipelines.tracking.address import default_uri
from pipelines.tracking.runs import LoggedRun, read_runs
from tune_spaces import base

ROOT = Path(__file__).parents[1]
LOSSES = ("multi_similarity", "triplet", "proxy_anchor", "contrastive")
CASES = ("alone", "iaa", "namr", "sgar", "all")
SEARCH_SEED, SEARCH_AGAIN_SEED = 1000, 1001  # no tested run has them
HEADS = ("base loss", "method", "seeds", "R@1", "gain", "95 % of it", "p", "MAP@R", "gain", "95 % of it", "p")


class Study(NamedTuple):
    """What is studied, and with which budget.

    Attributes:
        recipe: What every cell starts from.
        values: Config values on top of it.
        options: Of a sweep of one cell; its space is the cell's.
        seeds: Tested runs of a cell.
        processes: Tested runs at a time.
        deadline: When nothing new may begin, in seconds since 1970.
    """

    recipe: str
    values: Mapping[str, Any]
    options: SweepOptions
    seeds: int
    processes: int
    deadline: float

    @property
    def experiment(self) -> str:
        return f"methods-{self.recipe}"

    def name(self, loss: str, what: str) -> str:
        """Name a sweep or the runs of a cell."""
        return f"{self.recipe}-{loss.replace('_', '')}-{what}"


def search(study: Study, name: str, space: str, recipe: str, values: Mapping[str, Any], samples: int) -> SweepOutcome:
    """Run a sweep, or what an interrupted one lacks, or return what a finished one found."""
    if Path("runs", name, "sweep.json").exists():
        return resume_sweep(name)
    values = {"seed": SEARCH_AGAIN_SEED, **study.values, **values, "name": name, "experiment": study.experiment}
    return start_sweep(recipe, values, study.options._replace(space=space, samples=samples))


def search_cell(study: Study, loss: str, method: str) -> SweepOutcome:
    """Search the settings of a cell, from the base loss's and, for all methods, from what each has found alone."""
    methods = [] if method == "alone" else [*METHODS] if method == "all" else [method]
    start = {"loss.name": loss, "method": [], "seed": SEARCH_SEED}
    samples = study.options.samples
    of_loss = search(study, study.name(loss, "base"), "base", study.recipe, start, 2 * samples)
    found: dict[str, Any] = {}
    if method == "all":
        for each in METHODS:
            found |= {k: v for k, v in search_cell(study, loss, each).winner.items() if v is not None}
    space = "+".join(methods) or "base"
    return search(study, study.name(loss, method), space, of_loss.recipe, {"method": methods} | found, samples)


def train(recipe: str, values: Mapping[str, Any], threads: int) -> str | None:
    """Train and test one run in this process; or return at once if it is done. Returns why it failed, if it did."""
    keep_between_runs()
    with torch_threads(threads):
        try:
            run_training(load(recipe, values), QUIET, here=True)
        except RunFailed as error:
            return str(error)
    return None


def test_cell(study: Study, pool: ProcessPoolExecutor, name: str, recipe: str) -> list[str]:
    """Train and test the winner of a cell, a recipe, over the seeds. Returns why runs failed."""
    place: dict[str, Any] = {"workers": 1, "experiment": study.experiment, "storage": f"runs/{name}"}
    threads = max(1, usable_cpus() // study.processes)
    values = [place | {"seed": seed, "name": f"{name}-s{seed}"} for seed in range(study.seeds)]
    runs = [pool.submit(train, recipe, of_seed, threads) for of_seed in values]
    return [f"{name}-s{seed}: {reason}" for seed, run in enumerate(runs) if (reason := run.result())]


class Clock:
    """Says whether there is time for one more sweep or test, by how long those so far have taken."""

    def __init__(self, deadline: float):
        self.deadline, self.took = deadline, dict[str, list[float]]()

    def has_time_for(self, kind: str) -> bool:
        return time.time() + (statistics.median(self.took[kind]) if self.took.get(kind) else 0) <= self.deadline

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        begun = time.time()
        yield
        if (seconds := time.time() - begun) > 10:  # not what was done before
            self.took.setdefault(kind, []).append(seconds)


def run(study: Study, cells: Sequence[tuple[str, str]]) -> list[str]:
    """Search and test cells as long as there is time. Returns why tested runs failed."""
    clock, failures = Clock(study.deadline), list[str]()
    spawn = multiprocessing.get_context("spawn")
    config = load(study.recipe, study.values)
    with ProcessPoolExecutor(study.processes, mp_context=spawn) as pool, open_cluster(config, None):
        for loss, method in cells:
            if not clock.has_time_for("search"):
                break
            messages.print(f"{loss}, {method}: search", style="bold")
            with clock.timed("search"):
                recipe = search_cell(study, loss, method).recipe
            if not clock.has_time_for("test"):
                break
            messages.print(f"{loss}, {method}: test", style="bold")
            with clock.timed("test"):
                failures += test_cell(study, pool, study.name(loss, method), recipe)
    return failures


def compare(study: Study, cells: Sequence[tuple[str, str]]) -> dict[tuple[str, str, str], Line]:
    """(loss, method, metric) -> its line, compared with the loss alone; p-values adjusted over a loss's methods."""
    uri, by_cell = default_uri(Path.cwd()), dict[tuple[str, str], list[LoggedRun]]()
    try:
        runs = [run for run in read_runs(uri, [study.experiment]) if run.status == "FINISHED"]
    except ValueError:  # nothing has begun
        return {}
    for loss, method in cells:
        names = {f"{study.name(loss, method)}-s{seed}" for seed in range(study.seeds)}
        by_cell[loss, method] = [run for run in runs if run.name in names and METRICS[0] in run.metrics]
    lines: dict[tuple[str, str, str], Line] = {}
    for loss in dict.fromkeys(loss for loss, _ in cells):
        of_loss = {method: by_cell[loss, method] for of, method in cells if of == loss and by_cell[loss, method]}
        if "alone" not in of_loss:
            continue
        labels = {run.group: method for method, several in of_loss.items() for run in several}
        flat = [run for several in of_loss.values() for run in several]
        exact = [metric.replace("test/", "test_exact/") for metric in METRICS]
        comparison = compare_runs(flat, loss, "alone", [*METRICS, *exact], labels)
        lines |= {(loss, line.group, line.metric): line for line in comparison.lines}
    return lines


def table(study: Study, cells: Sequence[tuple[str, str]], failures: Sequence[str]) -> str:
    """Return the study's tables in Markdown, and what they still lack."""
    lines, start = compare(study, cells), load(study.recipe, study.values).flat()
    rows, missing, settings = [], [], []
    for loss, method in cells:
        done = lines.get((loss, method, METRICS[0]))
        if (count := len(done.values) if done else 0) < study.seeds:
            missing.append(f"{loss} {method}" + (f" ({count} of {study.seeds} seeds)" if count else ""))
        if done:
            row = [loss, method, str(count)]
            for metric in METRICS:
                _, _, _, mean, deviation, _, gain, interval, p = format_line(lines[loss, method, metric])
                row += [f"{mean} ± {deviation}", gain, interval, p]
            rows.append(row)
        winner = Path("runs", study.name(loss, method), "best.yaml")
        if winner.exists():
            found = read_stored_config(winner.read_text())
            settings.append(f"- {loss}, {method}: `{searched(loss, found.flat(), start)}`")
    exact = [
        f"| {loss} | {method} | {format_line(plain)[3]} | {format_line(line)[3]} |"
        for loss, method in cells
        if (line := lines.get((loss, method, "test_exact/map_at_r"))) and (plain := lines[loss, method, METRICS[1]])
    ]
    done_cells = len(cells) - len(missing)
    least = 2 / 2**study.seeds * (len(CASES) - 1)
    parts = [
        f"{study.recipe}: {done_cells} of {len(cells)} cells are done. {3 * study.options.samples} points searched "
        f"for each, {study.options.folds} folds, {study.seeds} paired seeds; in percent. Gains are over the base loss "
        f"alone, *p* is of no gain (signs flipped, adjusted by Holm over the methods of a loss; with {study.seeds} "
        f"seeds the least possible is {least:.2g}).",
        "",
        *markdown(HEADS, rows),
        "",
    ]
    if missing:
        parts += [f"**Missing:** {', '.join(missing)}.", ""]
    if failures:
        parts += [f"**Failed:** {'; '.join(failures)}.", ""]
    if exact:
        parts += ["The whole gallery by the adaptive distance of NAMR:", ""]
        parts += ["| base loss | method | MAP@R by cosine | MAP@R exact |", "|---|---|---|---|", *exact, ""]
    return "\n".join([*parts, "Settings that the searches chose, where they differ from the recipe:", "", *settings])


def searched(loss: str, found: Mapping[str, Any], start: Mapping[str, Any]) -> str:
    """Write the settings of all spaces in which a winner differs from the recipe, numbers in three digits."""
    keys = {key for space in (*SPACES.values(), base.LOSSES[loss]) for key in space}
    changed = {key: value for key, value in found.items() if key in keys and value != start.get(key)}
    texts = (f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in changed.items())
    return " ".join(texts) or "as in the recipe"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]


def write(name: str, text: str) -> None:
    """Replace the part of docs/benchmarks.md between this study's two marks."""
    page, begin, end = ROOT / "docs" / "benchmarks.md", f"<!-- methods {name} -->", f"<!-- end of methods {name} -->"
    before, mark, rest = page.read_text().partition(begin)
    if mark:
        page.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("assignments", nargs="*", metavar="key=value")
    parser.add_argument("--samples", type=int, default=6, help="points of a search")
    parser.add_argument("--folds", type=int, default=3, help="choices of validation classes that each point has")
    parser.add_argument("--seeds", type=int, default=8, help="tested runs of a cell")
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="minutes after which nothing new begins; 0: the table alone"
    )
    parser.add_argument("--losses", nargs="+", default=LOSSES, choices=LOSSES)
    parser.add_argument("--methods", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--processes", type=int, default=usable_cpus(), help="tested runs at a time")
    parser.add_argument("--write", action="store_true", help="the table into docs/benchmarks.md")
    options = parser.parse_args()
    sweep = SweepOptions("", options.samples, folds=options.folds, final_seeds=0)
    values = flatten(parse_assignments(options.assignments))
    deadline = time.time() + 60 * options.budget
    study = Study(options.recipe, values, sweep, options.seeds, options.processes, deadline)
    methods = [m for m in CASES if m in options.methods or m == "alone"]
    cells = [*itertools.product(options.losses, methods)]
    failures = run(study, cells) if options.budget > 0 else []
    text = table(study, cells, failures)
    print(text)
    if options.write:
        write(study.recipe, text)


if __name__ == "__main__":
    run_script(main, "the same command goes on")
