"""Rows of annotation files as they were written, with all their columns."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet

from lavis_mafa.datasets.annotation_formats import PAIRS, objects_in_lines, objects_in_list, one_message

LONGEST_CELL = 1 << 30  # characters; Python's own limit is that of a caption of twenty thousand words


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of an annotation file with all their columns, one at a time."""
    suffix = path.suffix.lower()
    with one_message(path):
        if suffix == ".json":
            yield from objects_in_list(path, PAIRS)
        elif suffix == ".jsonl":
            with path.open(encoding="utf-8-sig") as file:
                yield from objects_in_lines(path, PAIRS, file)
        elif suffix == ".parquet":
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
        else:
            csv.field_size_limit(LONGEST_CELL)
            with path.open(encoding="utf-8-sig", newline="") as file:
                yield from csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",")
