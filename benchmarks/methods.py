"""What each method adds to each base loss on unseen classes: `dml tune` searches, `dml compare` compares.

    python benchmarks/methods.py glyphs --budget 480
    python benchmarks/methods.py grocery-whole data.root=GroceryStoreDataset --budget 480

A cell of the table is a base loss with some methods. The loss is searched alone first (tune_spaces.base, twice
`--samples` points over `--folds` folds of the training classes), and from the winner each cell searches `--samples`
points: a method its own space, and the loss alone the base space once more, so that all of them have the same budget.
All methods together begin with what each has found alone, so that the points of these searches are theirs, too. The
winner of a cell is trained over `--seeds` seeds that no search has used, and each run is tested once. Where the loss
alone has found other settings than those that its methods began from, these are tested without a method, too: what a
method adds is then told from what its base settings cost.

What is found, the settings of each cell and the test metrics of each seed, is kept in `--results`, one small file. The
same command goes on from it where it was interrupted, by its `--budget` of minutes or otherwise, on this machine or on
another; with more `--seeds` it adds them. Runs are in ./runs and in MLflow's experiment `methods-RECIPE`, and sweeps
that were cut off go on from there. Cells are taken in order of interest: loss by loss, each alone and then with its
methods. The table of the chosen cells is printed with what it still lacks; with --write that of all cells replaces the
one of docs/benchmarks.md. `--budget 0` takes any file of results and trains nothing.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dml_core.cpus import usable_cpus
from pipelines.cli.endings import fail, run_script
from pipelines.cluster.devices import resolve_devices
from pipelines.cluster.session import open_cluster
from pipelines.cluster.threads import torch_threads
from pipelines.compare.statistics import METRICS, compare_values, least_p_value
from pipelines.compare.wording import Line, format_line
from pipelines.config import Config, load
from pipelines.config.identity import FREE_KEYS, group_of
from pipelines.config.methods import METHODS
from pipelines.config.recipe import parse_assignments
from pipelines.config.schema import flatten
from pipelines.console import QUIET, RunFailed, messages
from pipelines.data.sets import identify
from pipelines.files import write_atomically
from pipelines.kept import keep_between_runs
from pipelines.runs.train import run_training
from pipelines.sweeps.records import SweepOptions
from pipelines.sweeps.sweep import resume_sweep, start_sweep

ROOT = Path(__file__).parents[1]
LOSSES = ("multi_similarity", "triplet", "proxy_anchor", "contrastive")
CASES = ("alone", "iaa", "namr", "sgar", "all")
EXACT = METRICS[1].replace("test/", "test_exact/")
SEARCH_SEED, SEARCH_AGAIN_SEED = 1000, 1001  # no tested run has them
HEADS = ("base loss", "method", "seeds", "R@1", "gain", "95 % of it", "p", "MAP@R", "gain", "95 % of it", "p")


class Cell(NamedTuple):
    """What is known of a cell, or of the first search of a loss.

    Attributes:
        settings: Config values that its search chose, on top of the study's.
        runs: Of each seed that is tested, the metrics.
    """

    settings: dict[str, Any]
    runs: dict[str, dict[str, float]]


class Results:
    """The cells of a study, kept in a file.

    Attributes:
        path: The file.
        study: What all cells depend on: the config that they start from, how much is searched, and on which pictures.
        cells: By base loss and method, as "triplet iaa"; "triplet base" is the first search.
    """

    def __init__(self, path: Path, study: Mapping[str, Any] | None = None):
        """Read the file, if there is one; end the script if it is of another study.

        Args:
            path: The file.
            study: That is to begin or to go on; None: what the file holds.
        """
        if study is None and not path.exists():
            fail(2, f"bad input: --results {path}: there is no such file")
        asked, self.path = json.loads(json.dumps(study)), path  # as a file has it
        self.study, self.cells = self.read() if path.exists() else (asked, dict[str, Cell]())
        if asked and asked != self.study:
            keys = [key for key in {**self.study, **asked} if asked.get(key) != self.study.get(key)]
            changes = ", ".join(f"{key}={asked.get(key)} (was {self.study.get(key)})" for key in keys[:4])
            fail(2, f"bad input: {path} is of another study: {changes}; --results names another file")

    def read(self) -> tuple[dict[str, Any], dict[str, Cell]]:
        """Return the study and the cells that the file holds."""
        try:
            kept = json.loads(self.path.read_text())
            return kept["study"], {name: Cell(**cell) for name, cell in kept["cells"].items()}
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            fail(2, f"bad input: --results {self.path}: not a file of results, {error!r}")

    def keep(self, name: str, cell: Cell) -> None:
        """Add or replace a cell, beside those that other processes have added."""
        self.cells = (self.read()[1] if self.path.exists() else {}) | {name: cell}
        cells = {name: cell._asdict() for name, cell in self.cells.items()}
        write_atomically(self.path, json.dumps({"study": self.study, "cells": cells}, indent=1) + "\n")

    def runs(self, loss: str, method: str, seeds: int) -> dict[str, dict[str, float]]:
        """Return the metrics of a cell's first seeds, as far as they are tested."""
        cell = self.cells.get(f"{loss} {method}")
        return {str(seed): cell.runs[str(seed)] for seed in range(seeds) if str(seed) in cell.runs} if cell else {}


class Study(NamedTuple):
    """What is studied, and with which budget.

    Attributes:
        recipe: What every cell starts from.
        values: Config values on top of it.
        options: Of a sweep of one cell; its space is the cell's.
        seeds: Tested runs of a cell.
        processes: Tested runs at a time.
        deadline: When nothing new may begin, in seconds since 1970.
        results: What is found.
    """

    recipe: str
    values: Mapping[str, Any]
    options: SweepOptions
    seeds: int
    processes: int
    deadline: float
    results: Results

    @property
    def experiment(self) -> str:
        return f"methods-{self.recipe}"

    def name(self, loss: str, what: str) -> str:
        """Name a sweep or the runs of a cell; those of another study have other names."""
        group = group_of(self.results.study, self.results.study["pictures"])
        return f"{self.recipe}-{group}-{loss.replace('_', '')}-{what}"

    def has_two_bases(self, loss: str) -> bool:
        """Whether the loss alone has other settings than those of the first search, which its methods began from."""
        base, alone = (self.results.cells.get(f"{loss} {what}") for what in ("base", "alone"))
        return bool(base and alone and base.settings != alone.settings)


def search(study: Study, loss: str, what: str, space: str, start: Mapping[str, Any], samples: int) -> Cell:
    """Run a sweep from settings, or what an interrupted one lacks; or return what is known of the cell."""
    if cell := study.results.cells.get(f"{loss} {what}"):
        return cell
    name = study.name(loss, what)
    if Path("runs", name, "sweep.json").exists():
        outcome = resume_sweep(name)
    else:
        seed = SEARCH_SEED if what == "base" else SEARCH_AGAIN_SEED
        values = {**study.values, **start, "seed": seed, "name": name, "experiment": study.experiment}
        outcome = start_sweep(study.recipe, values, study.options._replace(space=space, samples=samples))
    cell = Cell({**start, **outcome.winner}, {})
    study.results.keep(f"{loss} {what}", cell)
    return cell


def search_cell(study: Study, loss: str, method: str) -> Cell:
    """Search the settings of a cell, from the base loss's and, for all methods, from what each has found alone."""
    methods = [] if method == "alone" else [*METHODS] if method == "all" else [method]
    samples = study.options.samples
    start = search(study, loss, "base", "base", {"loss.name": loss, "method": []}, 2 * samples).settings
    if method == "all":
        for each in METHODS:
            start = start | search_cell(study, loss, each).settings
    return search(study, loss, method, "+".join(methods) or "base", start | {"method": methods}, samples)


def train(recipe: str, values: Mapping[str, Any], threads: int) -> dict[str, float] | str:
    """Train and test one run in this process, or look at it if it is done. Returns its metrics or why it failed."""
    keep_between_runs()
    with torch_threads(threads):
        try:
            metrics = run_training(load(recipe, values), QUIET, here=True).metrics
        except RunFailed as error:
            return str(error)
    return {metric: metrics[metric] for metric in (*METRICS, EXACT) if metric in metrics}


def test_cell(study: Study, pool: ProcessPoolExecutor, loss: str, method: str) -> list[str]:
    """Train and test a cell over the seeds that it lacks. Returns why runs failed."""
    name, cell, failures = study.name(loss, method), study.results.cells[f"{loss} {method}"], list[str]()
    place: dict[str, Any] = {"workers": 1, "experiment": study.experiment, "storage": f"runs/{name}"}
    values, threads = {**study.values, **cell.settings, **place}, max(1, usable_cpus() // study.processes)
    runs = {
        pool.submit(train, study.recipe, values | {"seed": seed, "name": f"{name}-s{seed}"}, threads): seed
        for seed in range(study.seeds)
        if str(seed) not in cell.runs
    }
    for run in as_completed(runs):
        seed, result = runs[run], run.result()
        if isinstance(result, str):
            failures.append(f"{name}-s{seed}: {result}")
        else:
            cell.runs[str(seed)] = result
            study.results.keep(f"{loss} {method}", cell)
    return failures


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
                search_cell(study, loss, method)
            if not clock.has_time_for("test"):
                break
            messages.print(f"{loss}, {method}: test", style="bold")
            with clock.timed("test"):
                failures += test_cell(study, pool, loss, method)
                if method == "alone" and study.has_two_bases(loss):
                    failures += test_cell(study, pool, loss, "base")
    return failures


def compare(study: Study, cells: Sequence[tuple[str, str]]) -> dict[tuple[str, str, str], Line]:
    """(loss, method, metric) -> its line, compared with the loss's first cell.

    p-values are adjusted over a loss's methods; there are none before all of them are tested over as many seeds.
    """
    lines: dict[tuple[str, str, str], Line] = {}
    for loss in dict.fromkeys(loss for loss, _ in cells):
        runs = {method: study.results.runs(loss, method, study.seeds) for of, method in cells if of == loss}
        for metric in (*METRICS, EXACT):
            values = {m: {seed: run[metric] for seed, run in of.items() if metric in run} for m, of in runs.items()}
            compared = compare_values(values, next(iter(runs)), metric)
            if not all(runs.values()) or len({line.shared for line in compared[1:]}) > 1:
                compared = [line._replace(p=None) for line in compared]
            lines |= {(loss, line.group, metric): line for line in compared}
    return lines


def table(study: Study, cells: Sequence[tuple[str, str]], failures: Sequence[str]) -> str:
    """Return the study's tables in Markdown, and what they still lack."""
    lines, start = compare(study, cells), study.results.study
    missing, settings = [], []
    bases = [(loss, "base" if method == "alone" else method) for loss, method in cells if study.has_two_bases(loss)]
    every = [*dict.fromkeys([*cells, *bases])]
    for loss, method in every:
        if (count := len(study.results.runs(loss, method, study.seeds))) < study.seeds:
            missing.append(f"{loss} {method}" + (f" ({count} of {study.seeds} seeds)" if count else ""))
        if cell := study.results.cells.get(f"{loss} {method}"):
            settings.append(f"- {loss}, {method}: `{format_settings(cell.settings, start)}`")
    exact = [
        [loss, method, format_line(plain)[3], format_line(line)[3]]
        for loss, method in cells
        if (line := lines.get((loss, method, EXACT))) and (plain := lines[loss, method, METRICS[1]])
    ]
    points, methods = start["--samples"], len({method for _, method in cells}) - 1
    parts = [
        f"{study.recipe}: {len(every) - len(missing)} of {len(every)} cells are done. {2 * points} points are searched "
        f"for a base loss, then {points} for each cell from there, and for all methods together after those of each; "
        f"{start['--folds']} folds, {study.seeds} paired seeds. Percent, ± the standard deviation over seeds. Gains "
        "are over the base loss alone; their intervals are Student's; *p* is two-sided, of a gain as large by chance "
        "(signs flipped, adjusted by Holm over the methods of a loss once all are tested over as many seeds; with "
        f"{study.seeds} seeds the least possible is {least_p_value(study.seeds, methods):.2g}). They tell of the luck "
        "of seeds, not of the search's or of the choice of classes.",
        "",
        *markdown(HEADS, rows_of(lines, cells)),
        "",
    ]
    if tested := [(loss, method) for loss, method in bases if study.results.runs(loss, "base", study.seeds)]:
        parts += [
            "A method keeps the base settings of the loss's first search. Over the loss alone with them (*base*), if "
            "its second search has found others:",
            "",
            *markdown(HEADS, rows_of(compare(study, tested), tested)),
            "",
        ]
    if missing:
        parts += [f"**Missing:** {', '.join(missing)}.", ""]
    if failures:
        parts += [f"**Failed:** {'; '.join(failures)}.", ""]
    if exact:
        parts += ["The whole gallery by the adaptive distance of NAMR:", ""]
        parts += [*markdown(("base loss", "method", "MAP@R by cosine", "MAP@R exact"), exact), ""]
    return "\n".join([*parts, "Settings that the searches chose, where they differ from the recipe:", "", *settings])


def rows_of(lines: Mapping[tuple[str, str, str], Line], cells: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Return the rows under HEADS of those cells that are tested."""
    rows = []
    for loss, method in cells:
        if done := lines.get((loss, method, METRICS[0])):
            row = [loss, method, str(len(done.values))]
            for metric in METRICS:
                _, _, _, mean, deviation, _, gain, interval, p = format_line(lines[loss, method, metric])
                row += [f"{mean} ± {deviation}", gain, interval, p]
            rows.append(row)
    return rows


def format_settings(found: Mapping[str, Any], start: Mapping[str, Any]) -> str:
    """Write the settings that a search chose, where they differ from the recipe, numbers in three digits."""
    named = ("loss.name", "method")  # which say what the cell is
    changed = {key: value for key, value in found.items() if key not in named and value != start.get(key)}
    texts = (f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in changed.items())
    return " ".join(texts) or "as in the recipe"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]


def split_page(page: Path, name: str) -> tuple[str, str]:
    """Return what stands before and after the table of study `name` on `page`, with the two marks around it."""
    begin, end = f"<!-- methods {name} -->", f"<!-- end of methods {name} -->"
    before, _, rest = page.read_text().partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        fail(2, f"bad input: --write: {page} has no lines {begin} and {end} for the table to stand between")
    return before + begin, end + after


def facts_of_study(config: Config, samples: int, folds: int) -> dict[str, Any]:
    """Return what the cells of a study depend on, see Results; `config` is what they start from."""
    here = resolve_devices(config, here=True)
    left_out = {*FREE_KEYS, "seed", "method", "loss.name"}
    facts = {key: value for key, value in config.flat().items() if key not in left_out}
    facts |= {"precision": here.precision, "pictures": identify(config.data).digest}
    return facts | {"--samples": samples, "--folds": folds}


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
    parser.add_argument("--results", type=Path, help="file of what is found (runs/methods-RECIPE.json)")
    parser.add_argument("--write", action="store_true", help="the table of all cells into docs/benchmarks.md")
    options = parser.parse_args()
    page = ROOT / "docs" / "benchmarks.md"
    if options.write:
        split_page(page, options.recipe)  # refused now, not after a night
    sweep = SweepOptions("", options.samples, folds=options.folds, final_seeds=0)
    values = flatten(parse_assignments(options.assignments))
    path = options.results or Path("runs", f"methods-{options.recipe}.json")
    facts = None
    if options.budget > 0:
        config = load(options.recipe, {**values, "method": [], "workers": 1})
        facts = facts_of_study(config, options.samples, options.folds)
    deadline = time.time() + 60 * options.budget
    methods = [m for m in CASES if m in options.methods or m == "alone"]
    cells = [*itertools.product(options.losses, methods)]
    study = Study(options.recipe, values, sweep, options.seeds, options.processes, deadline, Results(path, facts))
    failures = run(study, cells) if facts else []
    print(table(study, cells, failures))
    if options.write:
        before, after = split_page(page, study.recipe)
        page.write_text(f"{before}\n{table(study, [*itertools.product(LOSSES, CASES)], failures)}\n{after}")


if __name__ == "__main__":
    run_script(main, "the same command goes on")
