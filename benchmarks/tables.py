"""Seconds and memory to read a large table, split it and plan an epoch of it.

    python benchmarks/tables.py [--rows 10000000] [--classes 100000]

The peak of the process, and what of it the libraries take before the table is read.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from dml_core.data.datasets import split
from dml_core.data.sampling import BatchPlan
from dml_core.data.user_sets import load_table

CHUNK = 2**18


def write(path: Path, rows: int, classes: int) -> None:
    schema = pa.schema({"path": pa.string(), "label": pa.string()})
    with parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, CHUNK):
            numbers = range(start, min(rows, start + CHUNK))
            paths = [f"products/class_{i % classes:06d}/picture_{i:09d}.jpg" for i in numbers]
            writer.write(pa.table({"path": paths, "label": [f"class_{i % classes:06d}" for i in numbers]}, schema))


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--classes", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.parquet"
        write(path, options.rows, options.classes)
        print(f"{options.rows:,} rows, {path.stat().st_size / 2**20:.0f} MiB; libraries {peak():.2f} GiB")
        started = time.perf_counter()

        def told(what: str) -> None:
            print(f"{what:<28} {time.perf_counter() - started:>6.1f} s   peak {peak():.2f} GiB", flush=True)

        collection = load_table(str(path), None)
        told("read")
        splits = split(collection)
        told("split")
        plan = BatchPlan(splits.train.labels, 32, 4, 0)
        rows = plan.rows(0, slice(0, 32))
        told("plan of an epoch")
        first = next(iter(rows))
        assert len(first) == 32 and np.unique(splits.train.labels[[sample for sample, _ in first]]).size == 8


if __name__ == "__main__":
    main()
