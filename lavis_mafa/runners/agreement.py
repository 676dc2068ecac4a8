"""A number for what a data set holds, equal on machines that hold the same, and cheap enough to compute at every start.

All ranks must have been started with the same libraries, settings and data: a job that differs is refused before it trains.
"""

from __future__ import annotations

import fnmatch
import importlib.metadata
import json
import platform
import socket
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from torch import nn

from lavis_mafa import __version__
from lavis_mafa.config.read import flat, plain
from lavis_mafa.datasets.stored import PLACE
from lavis_mafa.distributed import gather_objects, world_size
from lavis_mafa.errors import UserError

pc: Any = pyarrow.compute  # whose functions a type checker cannot see: they are made at the import
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


LIBRARIES = ("torch", "torchvision", "transformers", "timm", "salesforce-lavis", "numpy", "pillow", "pyarrow")
# What differs by rank, or may differ by machine: where data lie (what is in them is compared), how a rank reaches the others.
LOCAL = ("run.rank", "run.gpu", "run.dist_*", "run.distributed", "run.output_dir", "datasets.*.build_info.*")
SHOWN = 3  # differences, and ranks
ADVICE = {
    "library": "Install the same versions on all machines",
    "setting": "Start every rank with the same YAML and options",
    "data": "Give every rank the same annotation files",
    "model": "Start every rank with the same YAML, options and library versions",
}


def check_ranks_agree(cfg: Any, datasets: Any = None, model: nn.Module | None = None) -> None:
    """Refuse a job whose ranks differ. Call it on every rank; a single process returns at once.

    Raises:
        UserError: on all ranks: the first facts that differ, with the values of rank 0 and of the ranks that have others.
    """
    if world_size() == 1:
        return
    hosts, everyone = zip(*gather_objects((socket.gethostname(), facts_of_run(cfg, datasets, model))), strict=True)
    message = first_differences(everyone, hosts)
    if message is not None:
        raise UserError(message)


def first_differences(everyone: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> str | None:
    """What to tell about ranks with these facts; None where all have the same."""
    told = []
    for name in dict.fromkeys(name for facts in everyone for name in facts):
        values = [facts.get(name) for facts in everyone]
        others = [rank for rank, value in enumerate(values) if value != values[0]]
        if others:
            shown = ", ".join(f"{values[rank]} on rank {rank} ({hosts[rank]})" for rank in [0, *others[:SHOWN]])
            told.append(f"{name}: {shown}" + (f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""))
    if not told:
        return None
    more = f"; and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
    return f"the ranks differ in {'; '.join(told[:SHOWN])}{more}. {ADVICE[told[0].split()[0]]}."


def facts_of_run(cfg: Any, datasets: Any = None, model: nn.Module | None = None) -> dict[str, Any]:
    """What must be the same on all ranks, by names whose first word is a key of ``ADVICE``.

    Weights are left out: rank 0's are sent to the others.

    Args:
        cfg: LAVIS's configuration.
        datasets: data sets in dictionaries of any depth, by data set and split.
        model: its parameters' names and shapes count.
    """
    facts: dict[str, Any] = {"library python": ".".join(platform.python_version_tuple()[:2]), "library lavis_mafa": __version__}
    facts |= {f"library {name}": _version(name) for name in LIBRARIES}
    settings = flat(plain(cfg.config))
    facts |= {f"setting {key}": value for key, value in settings.items() if not any(fnmatch.fnmatch(key, local) for local in LOCAL)}
    for name, dataset in flat(datasets or {}).items():
        for number, part in enumerate(parts(dataset)):
            where = f"data {name}" + (f", part {number}" if number else "")
            facts[f"{where}: class"] = f"{type(part).__module__}.{type(part).__qualname__}"
            facts[f"{where}: samples"] = len(part) if hasattr(part, "__len__") else None
            facts |= {f"{where}: contents of {column}": value for column, value in fingerprints(part).items()}
    if model is not None:
        shapes = repr([(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()])
        facts["model parameters"] = sum(p.numel() for p in model.parameters())
        facts["model parameters' names and shapes"] = f"{zlib.crc32(shapes.encode()):08x}"
    return facts


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
