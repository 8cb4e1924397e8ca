"""`dml compare --queries`: configs compared query by query: their runs, the runs' queries, and the page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pyarrow import parquet
from rich.console import Console

from dml_core.data.datasets import LabelledImages, Retrieval
from pipelines.compare.comparison import ComparisonOutcome, publish, require_writable
from pipelines.compare.page import QueriesContent, QueriesOfConfig, draw_class_gains
from pipelines.compare.queries import SMALLEST, PairedQueries, QueryComparison, compare_queries, most_moved
from pipelines.compare.statistics import DIGEST_KEY, METRICS, Group, choose_baseline, compare_runs, group_runs
from pipelines.compare.wording import CLASS_HEADS, QUERY_HEADS, QUERY_METRICS, format_class, format_query_line
from pipelines.config.identity import REPORT_KEYS, group_of, with_absolute_places
from pipelines.config.recipe import with_values
from pipelines.config.schema import flatten
from pipelines.console import messages, stage
from pipelines.data.sets import identify, load_tests
from pipelines.kept import keep_meanwhile
from pipelines.models.checkpoint import read_config, read_data
from pipelines.models.find import find_checkpoint
from pipelines.models.start import identify_checkpoint
from pipelines.pages.gallery import Hit, Query
from pipelines.reports.inspection import encode_picture
from pipelines.runs.evaluate import describe_task, names_other_pictures
from pipelines.runs.queries import evaluate_queries, queries_file
from pipelines.runs.with_model import TrainedModel, open_model
from pipelines.tracking.address import default_uri
from pipelines.tracking.runs import LoggedRun, find_run, read_runs
from pipelines.tracking.server import prepare_store
from pipelines.training.query_rows import SCORES

CLASSES = 8  # shown of those that lose most, and of those that gain most

QUERIES, NEIGHBOURS = 4, 5  # shown of each sort, and of a query


class NamedRun(NamedTuple):
    """A run, and what find_checkpoint finds its model by."""

    logged: LoggedRun
    place: str


class TestedRun(NamedTuple):
    """A run with its model, its test, and the file of its queries once they are evaluated."""

    name: str
    model: TrainedModel
    test: Retrieval
    file: Path


class Pairing(NamedTuple):
    """The pairs of runs of a config and the baseline, by their ids. seeds: the seed of each pair."""

    group: Group
    seeds: tuple[str, ...]
    runs: list[tuple[str, str]]


def compare_by_queries(
    names: Sequence[str],
    assignments: Mapping[str, Any],
    baseline: str | None = None,
    metrics: Sequence[str] = METRICS,
    html: Path | None = None,
    log: bool = True,
    console: Console = messages,
) -> ComparisonOutcome:
    """Compare runs by config, over their seeds and query by query.

    Args:
        names: MLflow run ids and experiments, checkpoint folders, and models:/NAME@ALIAS.
        assignments: Config values that say where pictures are now, nested.
        baseline: Part of a config's label, or the name or id of a run of it. None: the config without methods.
        metrics: Names of metrics of the comparison over seeds.
        html: A file to write the page to.
        log: Keep the page and the numbers in MLflow, in the baseline's experiment.
        console: Where progress is shown.

    Raises:
        ValueError: A name means nothing, there are not two configs, not exactly one such baseline, no pair of runs, a
            run's model is gone, or the runs are not tested on the same pictures.
        RunFailed: Workers failed.
    """
    values = flatten(dict(assignments))
    if refused := sorted({*values} - REPORT_KEYS):
        raise ValueError(
            f"{refused[0]} cannot act: runs are compared as they are; {', '.join(sorted(REPORT_KEYS))} may differ"
        )
    require_writable(html)
    uri, title = default_uri(Path.cwd()), " and ".join(names)
    prepare_store(uri)
    with stage(console, "reading the runs"):
        named = read_named_runs(uri, names)
        groups, notes = group_runs([run.logged for run in named.values()])
    if len(groups) < 2:
        raise ValueError(
            f"--queries: two configs are needed, and the finished runs among these are of {len(groups)}"
            f"{''.join(f'; {note}' for note in notes)}; name runs of another config, too"
        )
    chosen = choose_baseline(groups, baseline)
    pairings, warnings = pair_runs(chosen, [group for group in groups if group.key != chosen.key])
    paired = {run_id: named[run_id] for pairing in pairings for pair in pairing.runs for run_id in pair}
    with keep_meanwhile():  # a set is listed once for all runs
        tested = {run_id: _open_run(run, values, console) for run_id, run in paired.items()}
        _require_same_test([*tested.values()])
        for number, run in enumerate(tested.values(), 1):
            if not run.file.is_file():
                console.print(f"evaluating run {number} of {len(tested)}: {run.name}", highlight=False, markup=False)
            evaluate_queries(run.model, values, console)
    first = next(iter(tested.values()))
    scores = {run_id: _read_scores(run.file) for run_id, run in tested.items()}
    with_match = np.flatnonzero(~np.isnan(next(iter(scores.values()))[QUERY_METRICS[0]]))
    if unmatched := len(first.test.query) - len(with_match):
        warnings.append(f"{unmatched} queries have no match and are left out")
    configs = [_pair_queries(pairing, scores, with_match, first.test.query) for pairing in pairings]
    with stage(console, "comparing"):
        queries = compare_queries(configs)
        queries = queries._replace(warnings=warnings + queries.warnings)
    logged = [_with_measured(run.logged, scores.get(run_id)) for run_id, run in named.items()]
    comparison = compare_runs(logged, title, baseline, metrics)
    with stage(console, "drawing the page"):
        shown = [
            _show_config(pairing, config, queries, tested, with_match)
            for pairing, config in zip(pairings, configs, strict=True)
        ]
        rows = [format_query_line(line) for line in queries.lines]
        content = QueriesContent(queries.warnings, QUERY_HEADS, rows, CLASS_HEADS, shown)
    return publish(uri, title, comparison, html, log, queries, content)


def read_named_runs(uri: str, names: Sequence[str]) -> dict[str, NamedRun]:
    """Read the runs that names mean, by their ids: MLflow's, those of checkpoints, and those of registered models."""
    named: dict[str, NamedRun] = {}
    for name in names:
        folder = Path(name)
        is_folder = (folder / "manifest.json").is_file() or (folder / "run.json").is_file()
        if is_folder or "://" in name or name.startswith("models:/"):
            run = _run_of_checkpoint(uri, name)
            named[run.run_id] = NamedRun(run, name)
        else:
            named |= {run.run_id: NamedRun(run, run.run_id) for run in read_runs(uri, [name])}
    return named


def _run_of_checkpoint(uri: str, name: str) -> LoggedRun:
    """Return the run of a checkpoint, or what its config tells where MLflow does not know it; as finished.

    Its test metrics are left out: they may be those of another epoch.
    """
    folder = find_checkpoint(name)
    start, config, data = identify_checkpoint(name, folder), read_config(folder), read_data(folder)
    digest = data.digest if data else "unknown"
    params = {key: str(value) for key, value in config.flat().items()}
    run = find_run(uri, start.run_id) if start.run_id else None
    run = run or LoggedRun(
        run_id=start.run_id or start.fingerprint[:32],
        name=start.name,
        experiment="",
        group=group_of(config.flat(), digest),
        seed=str(config.seed),
        status="FINISHED",
        started=0,
        params=params,
        metrics={},
        tags={DIGEST_KEY: digest},
    )
    metrics = {metric: value for metric, value in run.metrics.items() if not metric.startswith("test")}
    return run._replace(status="FINISHED", metrics=metrics)


def pair_runs(baseline: Group, others: Sequence[Group]) -> tuple[list[Pairing], list[str]]:
    """Pair the runs of each config with the baseline's of the same seed; single runs whatever their seeds.

    Returns:
        The pairings, and warnings about what is not paired, or not by seed.

    Raises:
        ValueError: No run of any config can be paired.
    """
    pairings, warnings = [], []
    for group in others:
        seeds = [seed for seed in group.runs if seed in baseline.runs]
        pairs = [(baseline.runs[seed].run_id, group.runs[seed].run_id) for seed in seeds]
        if not seeds and len(group.runs) == len(baseline.runs) == 1:
            ((seed, run),), ((other, of_baseline),) = group.runs.items(), baseline.runs.items()
            seeds, pairs = [seed], [(of_baseline.run_id, run.run_id)]
            warnings.append(
                f"{group.label}: seed {seed} against the baseline's seed {other}: a part of the difference is that of "
                "the seeds"
            )
        if pairs:
            pairings.append(Pairing(group, tuple(seeds), pairs))
        else:
            warnings.append(f"{group.label}: shares no seed with the baseline and is left out query by query")
    if not pairings:
        raise ValueError(
            f"--queries: no config shares a seed with the baseline, {baseline.label} (seeds "
            f"{', '.join(baseline.runs)}); train it with the others' seeds, or choose another --baseline"
        )
    return pairings, warnings


def _open_run(run: NamedRun, values: Mapping[str, Any], console: Console) -> TestedRun:
    """Find a run's model and list its test. ValueError: they are not there, or queries have no scores of their own."""
    name = run.logged.name
    try:
        folder = find_checkpoint(run.place)
        _require_own_pictures(folder, values)
        model = open_model(folder, values, console)
        test = load_tests(model.config, model.unreadable)["test"]
    except ValueError as error:
        raise ValueError(f"--queries, run {name}: {error}") from None
    if test.draws:
        raise ValueError(
            f"--queries cannot act on {model.config.data.name} (run {name}), whose galleries are drawn several times"
        )
    return TestedRun(name, model, test, queries_file(model))


def _require_own_pictures(folder: Path, values: Mapping[str, Any]) -> None:
    """Raise ValueError where values name other pictures than those of a checkpoint's training, which may have moved."""
    trained_by, before = read_config(folder), read_data(folder)
    if not names_other_pictures(trained_by, values):
        return
    there = identify(with_absolute_places(with_values(trained_by, values).data), lambda _: None)
    if not before or before.pictures != there.pictures:
        raise ValueError(
            f"the pictures there are not those of the training, which were {before}; they are {there}; a copy of a "
            "folder needs the times of its files, too (cp -a, rsync -a)"
        )


def _require_same_test(runs: Sequence[TestedRun]) -> None:
    """Raise ValueError, before any worker starts, where runs are not tested on the same pictures."""
    first = runs[0]
    for run in runs[1:]:
        if _what_is_tested(run) != _what_is_tested(first):
            raise ValueError(
                f"--queries: {run.name} and {first.name} are not tested on the same pictures: {_describe_test(run)} "
                f"against {_describe_test(first)}; compare them without --queries, or train them on one set with the "
                "same test classes"
            )


def _what_is_tested(run: TestedRun) -> tuple[str, ...]:
    images = [run.test.query, *([run.test.gallery] if run.test.gallery else [])]
    return run.model.data.pictures, *(part.digest() for part in images)


def _describe_test(run: TestedRun) -> str:
    counts = describe_task(run.test)
    return f"{counts['queries']:,} queries of {counts['classes']:,} classes of the set {run.model.data}"


def _read_scores(file: Path) -> dict[str, np.ndarray]:
    """Read the score of each query by the name of a test metric, (N,); those without a match have NaN."""
    table = parquet.read_table(file, columns=[*SCORES.values()])
    return {f"test/{metric}": table[column].to_numpy() for metric, column in SCORES.items()}


def _pair_queries(
    pairing: Pairing, scores: Mapping[str, Mapping[str, np.ndarray]], with_match: np.ndarray, images: LabelledImages
) -> PairedQueries:
    """Take the baseline's scores from a config's, of the queries that have a match."""
    gains = {
        metric: np.stack([(scores[run][metric] - scores[base][metric])[with_match] for base, run in pairing.runs])
        for metric in QUERY_METRICS
    }
    return PairedQueries(pairing.group.label, pairing.seeds, images.labels[with_match], images.class_names, gains)


def _with_measured(run: LoggedRun, scores: Mapping[str, np.ndarray] | None) -> LoggedRun:
    """Return a run with the means over its queries for the test metrics that MLflow does not have."""
    measured = {metric: float(np.nanmean(values)) for metric, values in (scores or {}).items()}
    return run._replace(metrics=measured | run.metrics)


def _show_config(
    pairing: Pairing,
    config: PairedQueries,
    comparison: QueryComparison,
    tested: Mapping[str, TestedRun],
    with_match: np.ndarray,
) -> QueriesOfConfig:
    """Choose what the page shows of a config: the classes and queries that lose and gain most, with pictures."""
    test, label = tested[pairing.runs[0][0]].test, pairing.group.label
    lost, won = most_moved(comparison.classes, label, CLASSES)
    first_rows = dict(zip(test.query.labels[with_match][::-1].tolist(), with_match[::-1].tolist(), strict=True))
    rows_by_name = {test.query.class_names[number]: row for number, row in first_rows.items()}
    classes = [
        (encode_picture(test.query, rows_by_name[recall.label]), format_class((recall, precision)))
        for recall, precision in [*lost, *reversed(won)]
    ]
    queries = {
        text: [
            _show_query(pairing, config, tested, with_match, place, sign)
            for place in telling_queries(sign * config.gains[QUERY_METRICS[1]].mean(0), config.classes)
        ]
        for text, sign in (("Queries that lose most", -1), ("Queries that gain most", 1))
    }
    lines = [line for line in comparison.lines if line.group == label]
    gains = [gain for gain in comparison.classes if gain.group == label]
    return QueriesOfConfig(label, draw_class_gains(lines, gains), classes, queries)


def telling_queries(gains: np.ndarray, classes: np.ndarray) -> list[int]:
    """Return the places of the queries that gain most, the first of each class alone, so that no class fills the page.

    Args:
        gains: (Q,)
        classes: (Q,)
    """
    chosen: dict[int, int] = {}
    for place in np.argsort(-gains, kind="stable").tolist():
        if gains[place] <= SMALLEST or len(chosen) == QUERIES:
            break
        chosen.setdefault(int(classes[place]), place)
    return [*chosen.values()]


def _show_query(
    pairing: Pairing,
    config: PairedQueries,
    tested: Mapping[str, TestedRun],
    with_match: np.ndarray,
    place: int,
    sign: int,
) -> Query:
    """Show a query's nearest by the baseline and by the config, of the pair of runs that differs most on it."""
    recall, precision = (config.gains[metric][:, place] for metric in QUERY_METRICS)
    pair, row = int(np.argmax(sign * precision)), int(with_match[place])
    runs = [tested[run_id] for run_id in pairing.runs[pair]]
    test, pairs = runs[0].test, len(config.seeds)
    hits = {
        f"{way}: R@1 {recall_at_1:.0f}, AP@R {100 * average_precision:.0f} %": nearest
        for way, (recall_at_1, average_precision, nearest) in zip(
            ("by the baseline", "by the config"), (_nearest(run, row) for run in runs), strict=True
        )
    }
    changes = f"AP@R {100 * precision.mean():+.0f} points"
    if pairs > 1:
        changes += (
            f" in the mean over {pairs} pairs of runs; R@1 won in {(recall > 0).sum()} and lost in "
            f"{(recall < 0).sum()} of them; here that of seed {config.seeds[pair]}"
        )
    name = _name_of(test.query, row)
    class_name = test.query.class_names[test.query.labels[row]]
    return Query(encode_picture(test.query, row), class_name, hits, name, f"{name}: {changes}")


def _nearest(run: TestedRun, row: int) -> tuple[float, float, list[Hit]]:
    """Return a query's R@1, its AP@R and its nearest pictures."""
    found = parquet.read_table(run.file, columns=[*SCORES.values(), "neighbor_positions"]).slice(row, 1).to_pylist()[0]
    images, label = run.test.gallery or run.test.query, run.test.query.labels[row]
    class_names = run.test.query.class_names
    hits = [
        Hit(
            encode_picture(images, place),
            images.class_names[images.labels[place]],
            bool(images.class_names[images.labels[place]] == class_names[label]),
            _name_of(images, place),
        )
        for place in found["neighbor_positions"][:NEIGHBOURS]
    ]
    return found["recall_at_1"], found["average_precision_at_r"], hits


def _name_of(images: LabelledImages, row: int) -> str:
    """Return the name of a picture's file, or its class and place where it has none."""
    if images.files is None:
        return f"{images.class_names[images.labels[row]]}, picture {row}"
    return str(images.entry(row))
