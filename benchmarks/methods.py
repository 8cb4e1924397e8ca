"""What each method adds to each base loss, on unseen classes, over paired seeds.

    python benchmarks/methods.py grocery data.root=GroceryStoreDataset
    python benchmarks/methods.py glyphs data.limit_classes=100 epochs=8

Settings are chosen by MAP@R on validation classes, the mean over two draws of them (`data.split_seed`): first those of
the base loss alone, out of `--samples` (the recipe's and random ones of tune_spaces.base); then, on top of these, as
many again of each method's own space, and for the loss alone as many again of the base space. All methods together take
the settings that each had alone. Then `--seeds` runs of each, other seeds than in the search, are tested once.

Every outcome is kept in `--out`, so that an interrupted benchmark goes on; the tables go to docs/benchmarks.md.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from pipelines.console import RunFailed

ROOT = Path(__file__).parents[1]
LOSSES = ("triplet", "contrastive", "multi_similarity", "proxy_anchor")
METHODS: tuple[tuple[str, ...], ...] = ((), ("iaa",), ("sgar",), ("namr",), ("iaa", "sgar", "namr"))
SPLITS, SEARCH_SEED = (0, 1), 1000
SHOWN = {"test/recall_at_1": "R@1", "test/map_at_r": "MAP@R"}
KEPT = (*SHOWN, "test_exact/recall_at_1", "test_exact/map_at_r", "val/best_map_at_r", "best_epoch", "train/sgar_open")
Settings = dict[str, Any]


def begin() -> None:
    """One thread a process."""
    import torch

    torch.set_num_threads(1)


def run(assignments: list[str], test: bool) -> dict[str, float]:
    """One training in this process; what a diverged one scores is nothing."""
    from pipelines.cluster.devices import resolve_devices
    from pipelines.cluster.in_process import run_in_process
    from pipelines.config.recipe import load_recipe
    from pipelines.training.job import TrainingJob

    with tempfile.TemporaryDirectory() as storage:
        config = load_recipe(assignments[0], [*assignments[1:], "workers=1", "name=run", f"storage={storage}"])
        try:
            metrics = run_in_process(TrainingJob(resolve_devices(config, here=True), test=test)).metrics
        except RunFailed as error:
            if "not finite" not in str(error):
                raise
            return {"val/best_map_at_r": 0.0}
    return {key: metrics[key] for key in KEPT if key in metrics}


class Bench:
    """Runs trainings over the processes of a pool, and remembers them in a file."""

    def __init__(self, common: list[str], out: Path, processes: int):
        self.common, self.out = common, out
        self.known: dict[str, dict[str, float]] = {}
        if out.exists():
            self.known = {line["key"]: line["metrics"] for line in map(json.loads, out.read_text().splitlines())}
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=begin)

    def all(self, wanted: list[tuple[Settings, bool]]) -> list[dict[str, float]]:
        """The metrics of each (settings, tested)."""
        arguments = [[*self.common, *(f"{k}={json.dumps(v)}" for k, v in s.items())] for s, _ in wanted]
        keys = [json.dumps([a, test]) for a, (_, test) in zip(arguments, wanted, strict=True)]
        waiting = {
            self.pool.submit(run, a, test): key
            for a, (_, test), key in zip(arguments, wanted, keys, strict=True)
            if key not in self.known
        }
        for number, done in enumerate(as_completed(waiting)):
            key = waiting[done]
            self.known[key] = done.result()
            with open(self.out, "a") as file:
                file.write(json.dumps({"key": key, "metrics": self.known[key]}) + "\n")
            print(f"{number + 1}/{len(waiting)}", key, self.known[key], flush=True)
        return [self.known[key] for key in keys]

    def best(self, candidates: dict[Any, list[Settings]]) -> dict[Any, Settings]:
        """Of each case the settings with the highest mean validation score."""
        searched = {"seed": SEARCH_SEED}
        flat = [(case, s) for case, several in candidates.items() for s in several]
        wanted = [({**s, **searched, "data.split_seed": split}, False) for _, s in flat for split in SPLITS]
        scores = [m["val/best_map_at_r"] for m in self.all(wanted)]
        means = [statistics.mean(scores[i * len(SPLITS) : (i + 1) * len(SPLITS)]) for i in range(len(flat))]
        found: dict[Any, tuple[float, Settings]] = {}
        for (case, settings), score in zip(flat, means, strict=True):
            if case not in found or score > found[case][0]:
                found[case] = score, settings
        return {case: settings for case, (_, settings) in found.items()}


def draw(space: Settings, count: int, seed: int) -> list[Settings]:
    """`count` random points of a space."""
    random = np.random.RandomState(seed)
    drawn = [{key: domain.sample(random_state=random) for key, domain in space.items()} for _ in range(count)]
    return [{k: v.item() if isinstance(v, np.generic) else v for k, v in one.items()} for one in drawn]


def search(bench: Bench, samples: int) -> dict[tuple[str, tuple[str, ...]], Settings]:
    """(loss, methods) -> the settings chosen on validation classes."""
    from tune_spaces import base, iaa, namr, sgar

    spaces = {"iaa": iaa.SPACE, "sgar": sgar.SPACE, "namr": namr.SPACE}
    alone = {loss: {"loss.name": loss, "method": []} for loss in LOSSES}
    first = {
        loss: [alone[loss], *({**alone[loss], **s} for s in draw(base.SPACE | base.LOSSES[loss], samples - 1, 0))]
        for loss in LOSSES
    }
    chosen = bench.best(first)
    second: dict[Any, list[Settings]] = {}
    for loss in LOSSES:
        again = draw(base.SPACE | base.LOSSES[loss], samples, 1)
        second[loss, ()] = [chosen[loss], *({**alone[loss], **s} for s in again)]
        for method, space in spaces.items():
            with_method = {**chosen[loss], "method": [method]}
            drawn = [{k: v for k, v in s.items() if v is not None} for s in draw(space, samples - 1, 2)]
            second[loss, (method,)] = [with_method, *({**with_method, **s} for s in drawn)]
    found = bench.best(second)
    for loss in LOSSES:
        together: Settings = {}
        for method in spaces:
            together |= found[loss, (method,)]
        found[loss, METHODS[-1]] = {**together, "method": [*METHODS[-1]]}
    return found


def interval(values: list[float]) -> str:
    """Mean and half of its 95 % interval (Student's t), in percent."""
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{100 * statistics.mean(values):.1f} ± {100 * half:.1f}"


def tables(bench: Bench, chosen: dict[tuple[str, tuple[str, ...]], Settings], seeds: int) -> str:
    cases = [*itertools.product(LOSSES, METHODS)]
    wanted = [({**chosen[case], "seed": seed}, True) for case in cases for seed in range(seeds)]
    metrics = bench.all(wanted)
    by_case = {case: metrics[i * seeds : (i + 1) * seeds] for i, case in enumerate(cases)}
    lines = ["| base loss | method | R@1 | MAP@R | R@1 gained | MAP@R gained | R@1, exact | MAP@R, exact |"]
    lines += ["|---" * 8 + "|"]
    for loss, methods in cases:
        runs = by_case[loss, methods]
        cells = [loss, "+".join(methods) or "alone"]
        cells += [interval([m[key] for m in runs]) for key in SHOWN]
        for key in SHOWN:
            pairs = zip(runs, by_case[loss, ()], strict=True)
            cells.append(interval([m[key] - plain[key] for m, plain in pairs]) if methods else "")
        for key in ("test_exact/recall_at_1", "test_exact/map_at_r"):
            cells.append(interval([m[key] for m in runs]) if "namr" in methods else "")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Settings chosen on validation classes (what is not named is the recipe's or the method's default):",
        "",
    ]
    for loss, methods in cases[: len(cases)]:
        if methods != METHODS[-1]:
            settings = {k: v for k, v in chosen[loss, methods].items() if k not in ("loss.name", "method")}
            shown = " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in settings.items())
            lines.append(f"- {loss}, {'+'.join(methods) or 'alone'}: `{shown or 'defaults'}`")
    return "\n".join(lines)


def write(name: str, text: str) -> None:
    """Replace the part of docs/benchmarks.md between this benchmark's two marks."""
    page, begin, end = ROOT / "docs" / "benchmarks.md", f"<!-- methods {name} -->", f"<!-- end of methods {name} -->"
    before, _, rest = page.read_text().partition(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("assignments", nargs="*")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--no-search", action="store_true", help="the defaults, for every loss and method")
    options = parser.parse_args()
    out = options.out or Path(f"methods_{options.recipe}.jsonl")
    bench = Bench([options.recipe, *options.assignments], out, options.processes)
    if options.no_search:
        chosen = {(loss, m): {"loss.name": loss, "method": [*m]} for loss, m in itertools.product(LOSSES, METHODS)}
    else:
        chosen = search(bench, options.samples)
    shown = " ".join(a for a in options.assignments if not a.startswith("data.root"))
    how = "no search" if options.no_search else f"{options.samples} samples a search"
    head = f"{options.seeds} seeds, {how}, `{options.recipe} {shown}`. Mean ± half of the 95 % interval, in percent;\n"
    head += "gains are paired by seed. *exact*: the whole gallery searched by adaptive distance.\n\n"
    text = head + tables(bench, chosen, options.seeds)
    print(text)
    write(options.recipe, text)


if __name__ == "__main__":
    main()
