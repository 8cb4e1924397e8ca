"""Test metrics of a training over several seeds: each run's, their mean and sample deviation.

python benchmarks/seeds.py 4 grocery data.root=GroceryStoreDataset loss.name=multi_similarity
"""

import json
import statistics
import subprocess
import sys

SHOWN = ("features/recall_at_1", "features/map_at_r", "test/recall_at_1", "test/map_at_r", "best_epoch")


def main(seeds: int, arguments: list[str]) -> None:
    print("dml train", *arguments)
    print(f"{'seed':<6}", *(f"{name:>21}" for name in SHOWN), f"{'seconds':>8}")
    rows = []
    for seed in range(seeds):
        command = [sys.executable, "-m", "pipelines.cli", "train", *arguments, f"seed={seed}", "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr.splitlines()[-1])
        outcome = json.loads(done.stdout.splitlines()[-1])
        rows.append([outcome["metrics"][name] for name in SHOWN] + [outcome["seconds"]])
        show(str(seed), rows[-1])
    columns = list(zip(*rows, strict=True))
    show("mean", [statistics.mean(c) for c in columns])
    if seeds > 1:
        show("sd", [statistics.stdev(c) for c in columns])


def show(title: str, row: list[float]) -> None:
    print(f"{title:<6}", *(f"{value:>21.4f}" for value in row[:-1]), f"{row[-1]:>8.0f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
