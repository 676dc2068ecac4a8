"""Time and memory of reading annotations, and what a forked data-loading worker adds.

    python benchmarks/annotation_memory.py --rows 5000000 --format jsonl --workers 2

Rows are synthetic; reading happens in a fresh process, so that its peak is the reader's own. Linux only (/proc).

Measured with 5,000,000 rows on a 2-core Xeon at 2.5 GHz, 2026-11-22, other work beside it; importing torch and pyarrow alone is
549 MB of the peak, the table 482 MB:

    format    read    with image keys    peak RSS    private memory of a forked worker
    parquet   4.5 s    7.0 s             1,479 MB     9 MB
    jsonl     7.1 s    9.4 s             1,441 MB    13 MB
    json     39.6 s   40.5 s             1,502 MB    10 MB
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import torch
from torch.utils.data import DataLoader, Dataset

WORDS = "a the dog cat man woman red blue riding standing on under old street photo of with small tree river house".split()
ROWS_AT_ONCE = 100_000


def rows(count: int) -> Iterator[dict[str, object]]:
    rng = random.Random(0)
    for number in range(count):
        caption = " ".join(rng.choices(WORDS, k=11))
        yield {"image": f"part-{number // 10_000:05}/{number:09}.jpg", "caption": caption, "image_id": number // 2}


def write(path: Path, count: int) -> None:
    everything = rows(count)
    if path.suffix == ".parquet":
        writer = None
        while chunk := list(islice(everything, ROWS_AT_ONCE)):
            table = pa.Table.from_pylist(chunk)
            writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()
        return
    with path.open("w") as file:
        if path.suffix == ".json":
            file.write("[" + json.dumps(next(everything)))
            file.writelines(",\n" + json.dumps(row) for row in everything)
            file.write("]")
        else:
            file.writelines(json.dumps(row) + "\n" for row in everything)


def private_mb() -> float:
    """Memory of this process that no other process shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))) / 1024


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Rows(Dataset):  # type: ignore[type-arg]
    """Reads captions as ``ImageTextPairs`` does, without images. Each sample reports its worker's private memory."""

    def __init__(self, table: pa.Table, keys: torch.Tensor) -> None:
        self.table, self.keys = table, keys

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> tuple[int, float]:
        caption = self.table["caption"][index].as_py()[0]
        image = self.table["image"][index].as_py()
        worker = torch.utils.data.get_worker_info()
        number = -1 if worker is None else worker.id
        return number, private_mb() if len(caption) + len(image) + int(self.keys[index]) and index % 1000 == 0 else 0.0


def measure(path: Path, workers: int) -> None:
    from lavis_mafa.datasets.annotations import image_keys, read_annotations

    before = resident_mb()
    start = time.perf_counter()
    table = read_annotations([path])
    read = time.perf_counter() - start
    keys = image_keys(table)
    done = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{path.suffix}: {table.num_rows:,} rows, file {path.stat().st_size / 2**20:,.0f} MB, table {table.nbytes / 2**20:,.0f} MB")
    print(f"  read {read:.1f} s, with image keys {done:.1f} s")
    print(f"  resident: {before:,.0f} MB before (imports), {resident_mb():,.0f} MB after, peak {peak:,.0f} MB")
    if workers:
        data = Rows(table, keys)
        loader = DataLoader(data, batch_size=500, sampler=torch.randperm(len(data))[:200_000].tolist(), num_workers=workers)
        most: dict[int, float] = {}
        for numbers, private in loader:
            for number, value in zip(numbers.tolist(), private.tolist(), strict=True):
                most[number] = max(most.get(number, 0.0), value)
        print(f"  private memory per forked worker after 200,000 rows: {', '.join(f'{value:,.0f} MB' for value in most.values())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--format", choices=["parquet", "jsonl", "json"], default="jsonl")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        measure(options.read, options.workers)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"annotations.{options.format}"
        write(path, options.rows)
        subprocess.run([sys.executable, __file__, "--read", str(path), "--workers", str(options.workers)], check=True)


if __name__ == "__main__":
    main()
