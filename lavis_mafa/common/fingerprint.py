"""A number for what a data set holds, equal on machines that hold the same, and cheap enough to compute at every start."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from lavis_mafa.datasets.arrow_compute import pc

SAMPLED_ROWS = 1000


def fingerprints(dataset: Any) -> dict[str, str]:
    """Of every row of our tables, of up to ``SAMPLED_ROWS`` rows of a list of annotations as LAVIS's data sets have it.

    Images are not looked at. Five million captions with their paths, half a gigabyte, take half a second.

    Returns:
        By column or list, text that differs where the contents do; empty for a data set that has neither.

    Example:
        >>> fingerprints(ImageTextPairs(...))
        {'image': '5f1b2c3d', 'caption': '9e107d9d'}
    """
    table = getattr(dataset, "table", None)
    if isinstance(table, pa.Table):
        return {name: f"{column_fingerprint(table[name]):08x}" for name in table.column_names}
    lists = {name: value for name, value in getattr(dataset, "__dict__", {}).items() if isinstance(value, list)}
    return {name: f"{rows_fingerprint(rows):08x}" for name, rows in sorted(lists.items())}


def rows_fingerprint(rows: Sequence[Any]) -> int:
    """Of a sequence's length, its first and last row, and rows evenly between."""
    places = sorted({round(i * (len(rows) - 1) / (SAMPLED_ROWS - 1)) for i in range(SAMPLED_ROWS)}) if rows else []
    # of an object the class alone: its text may hold an address
    text = json.dumps([len(rows), [rows[i] for i in places]], skipkeys=True, default=lambda value: type(value).__qualname__)
    return zlib.crc32(text.encode())


def column_fingerprint(column: pa.ChunkedArray) -> int:
    """Of every value of a column, whatever chunks it is cut into and wherever in their buffers they start."""
    running: dict[str, int] = {}
    for chunk in filter(len, column.chunks):
        for part, content in _contents(chunk, "values"):
            running[part] = zlib.crc32(content, running.get(part, 0))
    return zlib.crc32(repr(sorted(running.items())).encode())


def _contents(array: pa.Array, part: str) -> Iterator[tuple[str, memoryview]]:
    """Names and bytes such that equal arrays, in pieces or whole, give the same bytes under each name."""
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        yield f"lengths of {part}", _numbers(pc.list_value_length(array))
        yield from _contents(array.flatten(), f"items of {part}")
    elif pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        yield f"lengths of {part}", _numbers(pc.binary_length(array))
        if array.null_count:
            array = pc.drop_null(array)  # what a buffer has where a null is means nothing
        yield part, _text(array)
    else:
        yield from _contents(array.cast(pa.string()), part)


def _numbers(lengths: pa.Array) -> memoryview:
    return memoryview(pc.fill_null(lengths, -1).cast(pa.int64()).to_numpy(zero_copy_only=False)).cast("B")


def _text(array: pa.Array) -> memoryview:
    _, offsets, data = array.buffers()
    if data is None or len(array) == 0:
        return memoryview(b"")
    starts = np.frombuffer(offsets, np.int64 if pa.types.is_large_string(array.type) else np.int32)
    return memoryview(data)[starts[array.offset] : starts[array.offset + len(array)]]
