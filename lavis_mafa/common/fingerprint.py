"""A number for what a data set holds, equal on machines that hold the same, and cheap enough to compute at every start."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from lavis_mafa.datasets.arrow_compute import pc

ROWS_AT_ONCE = 10_000


def fingerprints(dataset: Any) -> dict[str, str]:
    """Of every row of our tables, and of a list of annotations as LAVIS's data sets have it.

    Images are not looked at. Five million captions with their paths, half a gigabyte, take half a second in a table, and in
    LAVIS's lists about as long as reading them took.

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


def parts(dataset: Any) -> Iterator[Any]:
    """The data sets that one is put together from; itself, if it is not."""
    children = getattr(dataset, "datasets", None)
    if children is None and not isinstance(dataset, tuple | list):
        yield dataset
        return
    for child in dataset if children is None else children:
        yield from parts(child)


def data_record(dataset: Any) -> list[dict[str, Any]]:
    """What a checkpoint says of its training data: of each part its ``rows`` and the fingerprints of its ``columns``."""
    return [{"rows": len(part), "columns": fingerprints(part)} for part in parts(dataset)]


def data_difference(saved: Any, now: Sequence[Mapping[str, Any]]) -> str | None:
    """How the data differ from those of a :func:`data_record`; None where they do not.

    Raises:
        ValueError: ``saved`` is no such record.

    Example:
        >>> data_difference([{"rows": 24, "columns": {}}], [{"rows": 28, "columns": {}}])
        'the data had 24 rows, now 28'
    """
    if not isinstance(saved, list) or not all(isinstance(part, dict) for part in saved):
        raise ValueError("the saved record of the data must be a list of dictionaries.")
    rows, columns = [part.get("rows") for part in saved], [part.get("columns") for part in saved]
    if not all(isinstance(count, int) for count in rows) or not all(isinstance(names, dict) for names in columns):
        raise ValueError("the saved record of the data must have rows and columns.")
    here = [part["rows"] for part in now]
    if sum(rows) != sum(here):
        return f"the data had {sum(rows)} rows, now {sum(here)}"
    if rows != here:
        return f"the data had parts of {', '.join(map(str, rows))} rows, now {', '.join(map(str, here))}"
    pairs = [(then, part["columns"]) for then, part in zip(columns, now, strict=True)]
    names = dict.fromkeys(name for then, today in pairs for name in (*today, *then) if then.get(name) != today.get(name))
    if names:
        return f"row content differs since the checkpoint was written ({', '.join(map(str, names))})"
    return None


def rows_fingerprint(rows: Sequence[Any]) -> int:
    """Of every row of a sequence, in its order."""
    running = zlib.crc32(str(len(rows)).encode())
    for start in range(0, len(rows), ROWS_AT_ONCE):
        # of an object the class alone: its text may hold an address
        text = json.dumps(rows[start : start + ROWS_AT_ONCE], skipkeys=True, default=lambda value: type(value).__qualname__)
        running = zlib.crc32(text.encode(), running)
    return running


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
