"""Whether a gain is real: runs grouped by config, seeds paired, intervals and p-values instead of one number each."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipelines.compare.wording import Interval, Line, short_number
from pipelines.config.identity import FREE_KEYS
from pipelines.config.methods import METHODS
from pipelines.tracking.runs import LoggedRun

METRICS = ("test/recall_at_1", "test/map_at_r")

RESAMPLES = 10_000

MIN_SEEDS = 5  # with fewer an interval is wide and leans on the normal distribution

DIGEST_KEY = "data_digest"  # a tag of MLflow's runs, beside the params in labels

BUDGET_KEYS = ("epochs", "steps_per_epoch", "batch.classes", "batch.images")


class Group(NamedTuple):
    """The runs of one config over one set of pictures, which differ by their seed alone.

    Attributes:
        label: The settings in which the config differs from the other groups' configs.
        key: The `group` tag that its runs have in MLflow.
        params: The flat config of its first run, and the digest of its set as DIGEST_KEY.
        runs: The run of each seed.
    """

    label: str
    key: str
    params: dict[str, str]
    runs: dict[str, LoggedRun]


class Comparison(NamedTuple):
    """Configs compared with a baseline.

    Attributes:
        baseline: Label of the baseline.
        warnings: What makes the comparison weaker than its numbers look.
        lines: A line for each metric and config.
        experiment: Id of the MLflow experiment that holds the baseline; empty where it is not known.
    """

    baseline: str
    warnings: list[str]
    lines: list[Line]
    experiment: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return what comparison.json holds."""
        lines = [line._asdict() for line in self.lines]
        return {"baseline": self.baseline, "warnings": self.warnings, "lines": lines}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "Comparison":
        """Return the comparison that `to_json` wrote; its experiment is not known."""
        return cls(tree["baseline"], tree["warnings"], [Line(**line) for line in tree["lines"]])


def compare_runs(
    runs: Sequence[LoggedRun],
    title: str,
    baseline: str | None,
    metrics: Sequence[str],
    labels: Mapping[str, str] | None = None,
) -> Comparison:
    """Compare finished runs by config.

    Args:
        runs: Runs of MLflow; those that did not finish are left out, with a warning.
        title: What is compared, for error messages.
        baseline: Part of a config's label, or the name or id of a run of it. None: the config without methods.
        metrics: Names of metrics. A config whose runs lack one has no line for it.
        labels: Label of each group, by its key. None: the settings in which it differs from the others.

    Raises:
        ValueError: There is nothing to compare, or not exactly one such baseline.
    """
    groups, warnings = group_runs(runs, labels)
    if not groups:
        raise ValueError(f"{title}: no finished runs of dml train among {len(runs)}")
    chosen = choose_baseline(groups, baseline)
    lines = compare_groups(groups, chosen, metrics)
    if not lines:
        raise ValueError(f"--metric {' '.join(metrics)}: no run has it")
    warnings += check_groups(groups, chosen)
    experiment = next(iter(chosen.runs.values())).experiment
    return Comparison(chosen.label, warnings, lines, experiment)


def group_runs(runs: Sequence[LoggedRun], labels: Mapping[str, str] | None = None) -> tuple[list[Group], list[str]]:
    """Group finished runs by config.

    Returns:
        Groups, in the order of their first runs, and warnings about runs that are left out.
    """
    warnings = []
    if unfinished := [run.name for run in runs if run.status != "FINISHED"]:
        warnings.append(f"{len(unfinished)} runs did not finish and are left out: {', '.join(unfinished[:3])}")
    by_group: dict[str, dict[str, LoggedRun]] = {}
    for run in sorted((run for run in runs if run.status == "FINISHED"), key=lambda run: run.started):
        seeds = by_group.setdefault(run.group, {})
        if run.seed in seeds:
            warnings.append(f"seed {run.seed} comes twice in one config; {run.name} counts, {seeds[run.seed].name} not")
        seeds[run.seed] = run
    first_runs = {key: next(iter(seeds.values())) for key, seeds in by_group.items()}
    params = {key: run.params | {DIGEST_KEY: run.tags.get(DIGEST_KEY, "unknown")} for key, run in first_runs.items()}
    labels = labels or _label_configs(params)
    return [Group(labels[key], key, params[key], seeds) for key, seeds in by_group.items()], warnings


def _label_configs(params: dict[str, dict[str, str]]) -> dict[str, str]:
    """Label each config by the settings that not all of them share, in few digits where these tell them apart."""
    keys = sorted({key for flat in params.values() for key in flat} - {*FREE_KEYS, "seed"})

    def is_left_open(key: str, flat: Mapping[str, str]) -> bool:
        section = key.partition(".")[0]  # of a method, tells nothing beside `method` where that is not used
        return key not in flat and (section not in METHODS or section in flat.get("method", ""))

    different = [
        key
        for key in keys
        if len({flat[key] for flat in params.values() if key in flat}) > 1
        or any(is_left_open(key, flat) for flat in params.values())
    ]
    texts: dict[str, dict[str, str]] = {}
    for key in different:
        values = {flat[key] for flat in params.values() if key in flat}
        short = {value: short_number(value) for value in values}
        texts[key] = short if len({*short.values()}) == len(values) else {value: value for value in values}
    labels = {}
    for group, flat in params.items():
        settings = [f"{key}={texts[key][flat[key]]}" for key in different if key in flat]
        labels[group] = " ".join(settings) or ("the rest as in all" if different else "all runs")
    return labels


def compare_groups(groups: Sequence[Group], baseline: Group, metrics: Sequence[str] = METRICS) -> list[Line]:
    """Compute a line for each metric and group; p-values are adjusted (Holm) over the comparisons of a metric."""
    labels = {group.key: group.label for group in groups}
    lines = []
    for metric in metrics:
        values = {g.key: {s: r.metrics[metric] for s, r in g.runs.items() if metric in r.metrics} for g in groups}
        of_metric = compare_values(values, baseline.key, metric)
        lines += [line._replace(group=labels[line.group]) for line in of_metric]
    return lines


def compare_values(values: Mapping[str, Mapping[str, float]], baseline: str, metric: str) -> list[Line]:
    """Compute a line for each config that has values; p-values are adjusted (Holm) over the configs.

    Args:
        values: Config to seed to its value of the metric.
        baseline: One of the configs.
        metric: Its name.
    """
    base, lines = values.get(baseline, {}), []
    for config, by_seed in values.items():
        if not by_seed:
            continue
        numbers = np.array([*by_seed.values()])
        line = Line(
            config,
            metric,
            dict(by_seed),
            float(numbers.mean()),
            float(numbers.std(ddof=1)) if len(numbers) > 1 else None,
            mean_interval(numbers),
        )
        shared = [seed for seed in by_seed if seed in base]
        if config != baseline and shared:
            gains = np.array([by_seed[seed] - base[seed] for seed in shared])
            line = line._replace(
                shared=len(shared), gain=float(gains.mean()), gain_interval=mean_interval(gains), p=p_value(gains)
            )
        lines.append(line)
    return adjust_p_values(lines)


def mean_interval(values: np.ndarray) -> Interval | None:
    """Compute the 95 % interval of the mean by Student's t.

    Over a handful of seeds a bootstrap of the mean is too narrow: over 5 normal values it holds in 85 % of cases.

    Args:
        values: (n,)

    Returns:
        Its ends; None for fewer than two values.
    """
    from scipy.stats import t

    if len(values) < 2:
        return None
    mean, half = values.mean(), values.std(ddof=1) / len(values) ** 0.5 * t.ppf(0.975, len(values) - 1)
    return float(mean - half), float(mean + half)


def p_value(gains: np.ndarray) -> float | None:
    """Compute the two-sided p-value of "no difference" by flipping the signs of paired differences.

    All combinations of signs are taken where they are at most RESAMPLES, else a random sample of them.

    Args:
        gains: (n,) a difference for each shared seed.

    Returns:
        The p-value; None for a single pair.
    """
    from scipy.stats import permutation_test

    if len(gains) < 2:
        return None
    result = permutation_test(
        (gains,),
        lambda x, axis: x.mean(axis),
        permutation_type="samples",
        n_resamples=RESAMPLES,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def adjust_p_values(lines: Sequence[Line]) -> list[Line]:
    """Adjust the lines' p-values for their number."""
    return [line._replace(p=p) for line, p in zip(lines, holm([line.p for line in lines]), strict=True)]


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values by Holm's step-down method (Scand. J. Statist. 6, 1979). None stays, and does not count."""
    tested = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted, highest = [*p_values], 0.0
    for number, (p, place) in enumerate(tested):
        highest = max(highest, min(1.0, p * (len(tested) - number)))
        adjusted[place] = highest
    return adjusted


def check_groups(groups: Sequence[Group], baseline: Group) -> list[str]:
    """List what makes a comparison weaker than its numbers look.

    That is few or unpaired seeds, other pictures or budgets, and test classes that were trained on before.
    """
    warnings = []
    for group in groups:
        if len(group.runs) < MIN_SEEDS:
            warnings.append(f"{group.label}: {len(group.runs)} seeds; an interval needs {MIN_SEEDS} to say much")
        if seen := next((run.tags["start_saw"] for run in group.runs.values() if "start_saw" in run.tags), ""):
            warnings.append(f"{group.label}: it began with a model that was trained on {seen} of its test classes")
        if group.key == baseline.key:
            continue
        if group.runs.keys() != baseline.runs.keys():
            shared = len(group.runs.keys() & baseline.runs.keys())
            warnings.append(f"{group.label}: its seeds differ from the baseline's; {shared} are shared and paired")
        pictures, others = group.params[DIGEST_KEY], baseline.params[DIGEST_KEY]
        if pictures != others:
            warnings.append(
                f"{group.label}: other pictures than the baseline's ({DIGEST_KEY} {pictures} against {others}): a gain "
                "is not one of settings alone; a copy without its files' times is another set (cp -a keeps them)"
            )
        if different := [key for key in BUDGET_KEYS if group.params.get(key) != baseline.params.get(key)]:
            settings = ", ".join(f"{k}={group.params.get(k)} against {baseline.params.get(k)}" for k in different)
            warnings.append(f"{group.label}: another budget than the baseline: {settings}")
    pairs = [len(g.runs.keys() & baseline.runs.keys()) for g in groups if g.key != baseline.key]
    if pairs and (least := least_p_value(max(pairs), sum(count > 1 for count in pairs))) > 0.05:
        warnings.append(f"with so few seeds no difference can reach p = 0.05: the least possible is {least:.2g}")
    return warnings


def least_p_value(seeds: int, configs: int) -> float:
    """Return the least adjusted p-value (Holm) that a config can have.

    Args:
        seeds: That the config shares with the baseline.
        configs: How many are compared with the baseline.
    """
    return min(1.0, configs * 2 / 2**seeds) if seeds > 1 else 1.0


def choose_baseline(groups: Sequence[Group], name: str | None) -> Group:
    """Choose the group that the others are compared with.

    Args:
        groups: At least one.
        name: Part of its label, or the name or id of one of its runs. None: a config without methods, or the first.

    Raises:
        ValueError: Not exactly one group goes by that name.
    """
    if name is None:
        return next((g for g in groups if g.params.get("method") == "[]"), groups[0])
    matches = [g for g in groups if name in g.label or any(name in (r.name, r.run_id) for r in g.runs.values())]
    if len(matches) != 1:
        labels = "; ".join(g.label for g in matches or groups)
        raise ValueError(f"--baseline {name}: {len(matches)} configs are meant by it, one is needed: {labels}")
    return matches[0]
