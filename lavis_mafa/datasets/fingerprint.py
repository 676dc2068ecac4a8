"""A number for what a data set holds, equal on machines that hold the same, and cheap enough to compute at every start."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from lavis_mafa.datasets.ids import pc
from lavis_mafa.datasets.stored import PLACE

ROWS_AT_ONCE = 10_000


def fingerprints(dataset: Any) -> dict[str, str]:
    """Of every row, by column of our tables or by list of annotations as LAVIS's data sets have it; images are not looked at, nor
    where they lie.

    Five million captions with their paths, half a gigabyte, take half a second in a table, and in LAVIS's lists about as long as
    reading them took.
    """
    table = getattr(dataset, "table", None)
    if isinstance(table, pa.Table):
        return {name: f"{column_fingerprint(table[name]):08x}" for name in table.column_names if name not in PLACE}
    lists = {name: value for name, value in getattr(dataset, "__dict__", {}).items() if isinstance(value, list)}
    return {name: f"{rows_fingerprint(rows):08x}" for name, rows in sorted(lists.items())}


def parts(dataset: Any) -> Iterator[Any]:
    """The data sets that one is put together from; itself, if it is not."""
    children = dataset if isinstance(dataset, tuple | list) else getattr(dataset, "datasets", None)
    if children is None:
        yield dataset
    for child in children or ():
        yield from parts(child)


def data_record(dataset: Any) -> list[dict[str, Any]]:
    """What a checkpoint says of its training data: of each part its ``rows`` and the fingerprints of its ``columns``."""
    return [{"rows": len(part), "columns": fingerprints(part)} for part in parts(dataset)]


def data_difference(saved: Any, now: Sequence[Mapping[str, Any]]) -> str | None:
    """How the data differ from those of a :func:`data_record`; None where they do not.

    Raises:
        ValueError: ``saved`` is no such record.
    """
    try:
        rows, columns = [int(part["rows"]) for part in saved], [dict(part["columns"]) for part in saved]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError("the saved record of the data is damaged.") from error
    here = [part["rows"] for part in now]
    if rows != here:
        return f"the data had {' + '.join(map(str, rows))} rows, now {' + '.join(map(str, here))}"
    pairs = [(then, part["columns"]) for then, part in zip(columns, now, strict=True)]
    names = dict.fromkeys(name for then, today in pairs for name in (*today, *then) if then.get(name) != today.get(name))
    return f"row content differs since the checkpoint was written ({', '.join(map(str, names))})" if names else None


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


def _contents(array: pa.Array, part: str) -> Iterator[tuple[str, Any]]:
    """Names and buffers such that equal arrays, in pieces or whole, give the same bytes under each name."""
    is_list = pa.types.is_list(array.type) or pa.types.is_large_list(array.type)
    large = pa.types.is_large_string(array.type)
    if not is_list and not large and not pa.types.is_string(array.type):
        yield from _contents(array.cast(pa.string()), part)
        return
    lengths = pc.list_value_length(array) if is_list else pc.binary_length(array)
    yield f"lengths of {part}", pc.fill_null(lengths, -1).cast(pa.int64()).to_numpy(zero_copy_only=False)
    if is_list:
        yield from _contents(array.flatten(), f"items of {part}")
        return
    array = pc.drop_null(array) if array.null_count else array  # what a buffer has where a null is means nothing
    _, offsets, data = array.buffers()
    if data is not None and len(array):
        starts = np.frombuffer(offsets, np.int64 if large else np.int32)
        yield part, memoryview(data)[starts[array.offset] : starts[array.offset + len(array)]]
    else:
        yield part, b""
