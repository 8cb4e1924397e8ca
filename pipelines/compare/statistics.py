"""Whether a gain is real: runs grouped by config, seeds paired, intervals and p-values instead of one number each."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipelines.compare import page
from pipelines.compare.wording import Interval, Line, short_number
from pipelines.config.identity import FREE_KEYS
from pipelines.tracking.runs import LoggedRun

METRICS = ("test/recall_at_1", "test/map_at_r")

RESAMPLES = 10_000

ENOUGH = 5  # seeds, below which an interval says little

BUDGET = ("epochs", "steps_per_epoch", "batch.classes", "batch.images")


class Group(NamedTuple):
    """Runs of one config, seeds apart. label: what sets it apart from the other groups.  runs: seed -> run."""

    label: str
    key: str
    params: dict[str, str]
    runs: dict[str, LoggedRun]


class Comparison(NamedTuple):
    """experiment: the id of the baseline's, in MLflow.  page: HTML, see `page`."""

    baseline: str
    experiment: str
    warnings: list[str]
    lines: list[Line]
    page: str


def compare_runs(
    runs: Sequence[LoggedRun],
    title: str,
    baseline: str | None,
    metrics: Sequence[str],
    labels: Mapping[str, str] | None = None,
) -> Comparison:
    """The whole of `dml compare`. ValueError where there is nothing to compare, or no such baseline.

    labels: of groups, by their keys. None: what sets each apart.
    """
    groups, warnings = grouped(runs, labels)
    if not groups:
        raise ValueError(f"{title}: no finished runs of dml train among {len(runs)}")
    chosen = chosen_baseline(groups, baseline)
    lines = compare_groups(groups, chosen, metrics)
    if not lines:
        raise ValueError(f"--metric {' '.join(metrics)}: no run has it")
    warnings += warnings_about(groups, chosen)
    experiment = next(iter(chosen.runs.values())).experiment
    return Comparison(chosen.label, experiment, warnings, lines, page.page(title, lines, chosen.label, warnings))


def grouped(runs: Sequence[LoggedRun], labels: Mapping[str, str] | None = None) -> tuple[list[Group], list[str]]:
    """Groups, in the order of their first runs, and warnings. Runs that did not finish are left out."""
    warnings = []
    if unfinished := [run.name for run in runs if run.status != "FINISHED"]:
        warnings.append(f"{len(unfinished)} runs did not finish and are left out: {', '.join(unfinished[:3])}")
    found: dict[str, dict[str, LoggedRun]] = {}
    for run in sorted((run for run in runs if run.status == "FINISHED"), key=lambda run: run.started):
        seeds = found.setdefault(run.group, {})
        if run.seed in seeds:
            warnings.append(f"seed {run.seed} comes twice in one config; {run.name} counts, {seeds[run.seed].name} not")
        seeds[run.seed] = run
    params = {key: next(iter(seeds.values())).params for key, seeds in found.items()}
    labels = labels or _labels(params)
    return [Group(labels[key], key, params[key], seeds) for key, seeds in found.items()], warnings


def _labels(params: dict[str, dict[str, str]]) -> dict[str, str]:
    """Of each config the settings that not all of them share, in few digits where these tell them apart."""
    keys = sorted({key for flat in params.values() for key in flat} - {*FREE_KEYS, "seed"})
    different = [key for key in keys if len({flat.get(key) for flat in params.values()}) > 1]
    shown: dict[str, dict[str, str]] = {}
    for key in different:
        values = {flat[key] for flat in params.values() if key in flat}
        short = {value: short_number(value) for value in values}
        shown[key] = short if len({*short.values()}) == len(values) else {value: value for value in values}
    labels = {}
    for group, flat in params.items():
        own = [f"{key}={shown[key][flat[key]]}" for key in different if key in flat]
        labels[group] = " ".join(own) or ("the rest as in all" if different else "all runs")
    return labels


def compare_groups(groups: Sequence[Group], baseline: Group, metrics: Sequence[str] = METRICS) -> list[Line]:
    """A line for each group and metric; p-values adjusted together (Holm) over the comparisons of a metric."""
    lines = []
    for metric in metrics:
        values = {g.key: {s: r.metrics[metric] for s, r in g.runs.items() if metric in r.metrics} for g in groups}
        base, some = values[baseline.key], []
        for group in groups:
            own = values[group.key]
            if not own:
                continue
            numbers = np.array([*own.values()])
            line = Line(
                group.label,
                metric,
                own,
                float(numbers.mean()),
                float(numbers.std(ddof=1)) if len(numbers) > 1 else None,
                interval(numbers),
            )
            shared = [seed for seed in own if seed in base]
            if group.key != baseline.key and shared:
                gains = np.array([own[seed] - base[seed] for seed in shared])
                line = line._replace(
                    shared=len(shared), gain=float(gains.mean()), gain_interval=interval(gains), p=p_value(gains)
                )
            some.append(line)
        lines += adjusted(some)
    return lines


def interval(values: np.ndarray) -> Interval | None:
    """95 % interval of the mean, by the bootstrap (bias-corrected and accelerated); None for fewer than two values."""
    from scipy.stats import bootstrap

    if len(values) < 2:
        return None
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    rng = np.random.default_rng(0)
    found = bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="BCa", rng=rng).confidence_interval
    if math.isnan(found.low):  # two values: no acceleration to be had
        rng = np.random.default_rng(0)
        found = bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="basic", rng=rng).confidence_interval
    return float(found.low), float(found.high)


def p_value(gains: np.ndarray) -> float | None:
    """Two-sided p of "no difference", by flipping the signs of paired differences: all of them where there are few.
    None for a single pair."""
    from scipy.stats import permutation_test

    if len(gains) < 2:
        return None
    rng = np.random.default_rng(0)
    kind: Any = {"permutation_type": "samples", "n_resamples": RESAMPLES, "vectorized": True, "rng": rng}
    return float(permutation_test((gains,), lambda x, axis: x.mean(axis), **kind).pvalue)


def adjusted(lines: Sequence[Line]) -> list[Line]:
    """Holm's step-down adjustment of the lines' p-values."""
    tested = sorted((i for i, line in enumerate(lines) if line.p is not None), key=lambda i: lines[i].p or 0.0)
    made, highest = list(lines), 0.0
    for place, i in enumerate(tested):
        highest = max(highest, min(1.0, (lines[i].p or 0.0) * (len(tested) - place)))
        made[i] = lines[i]._replace(p=highest)
    return made


def warnings_about(groups: Sequence[Group], baseline: Group) -> list[str]:
    """What makes a comparison weaker than its numbers look."""
    found = []
    for group in groups:
        if len(group.runs) < ENOUGH:
            found.append(f"{group.label}: {len(group.runs)} seeds; an interval needs at least {ENOUGH} to hold")
        if group.key == baseline.key:
            continue
        if group.runs.keys() != baseline.runs.keys():
            shared = len(group.runs.keys() & baseline.runs.keys())
            found.append(f"{group.label}: its seeds differ from the baseline's; {shared} are shared and paired")
        if different := [key for key in BUDGET if group.params.get(key) != baseline.params.get(key)]:
            told = ", ".join(f"{k}={group.params.get(k)} against {baseline.params.get(k)}" for k in different)
            found.append(f"{group.label}: another budget than the baseline: {told}")
    least = 2 / 2 ** min((len(g.runs.keys() & baseline.runs.keys()) for g in groups), default=0)
    if len(groups) > 1 and least * (len(groups) - 1) > 0.05:
        found.append(f"with so few seeds no difference can reach p = 0.05: the least possible is {least:.2g} each")
    return found


def chosen_baseline(groups: Sequence[Group], wanted: str | None) -> Group:
    """By a part of its label or the name or id of one of its runs; else a config without methods, else the first."""
    if wanted is None:
        return next((g for g in groups if g.params.get("method") == "[]"), groups[0])
    found = [g for g in groups if wanted in g.label or any(wanted in (r.name, r.run_id) for r in g.runs.values())]
    if len(found) != 1:
        labels = "; ".join(g.label for g in found or groups)
        raise ValueError(f"--baseline {wanted}: {len(found)} configs are meant by it, one is needed: {labels}")
    return found[0]
