"""Rows of annotation files as they were written, with all their columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet

from lavis_mafa.config.data import ending
from lavis_mafa.datasets.formats import PAIRS, objects_in_lines, objects_in_list, one_message, open_text, separated_values


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of an annotation file with all their columns, one at a time."""
    kind = ending(path)
    with one_message(path):
        if kind == ".json":
            yield from objects_in_list(path, PAIRS)
        elif kind in (".jsonl", ".ndjson"):
            with open_text(path) as file:
                yield from objects_in_lines(path, PAIRS, file)
        elif kind == ".parquet":
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
        else:
            values = separated_values(path, PAIRS)
            header = next(values, [])
            for row in values:
                yield dict(zip(header, row, strict=True))
