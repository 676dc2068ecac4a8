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
from omegaconf import OmegaConf
from torch import nn

from lavis_mafa import __version__
from lavis_mafa.datasets.ids import pc
from lavis_mafa.distributed import gather_objects, world_size
from lavis_mafa.errors import UserError

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


LIBRARIES = ("torch", "torchvision", "transformers", "timm", "salesforce-lavis", "numpy", "pillow", "pyarrow")
# What differs by rank, or may differ by machine: where data lie (what is in them is compared), how a rank reaches the others.
LOCAL = ("run.rank", "run.gpu", "run.dist_*", "run.distributed", "run.output_dir", "datasets.*.build_info.*")
SHOWN = 3
ADVICE = {
    "library": "Install the same versions on all machines",
    "setting": "Start every rank with the same YAML and options",
    "data": "Give every rank the same annotation files",
    "model": "Start every rank with the same YAML, options and library versions",
}


def check_ranks_agree(cfg: Any, datasets: Any = None, model: nn.Module | None = None) -> None:
    """Refuse a job whose ranks differ. Call it on every rank; a single process returns at once.

    Raises:
        UserError: on all ranks, see :func:`check_agreement`.

    Example:
        >>> check_ranks_agree(self.config, self.datasets, self._model)
    """
    if world_size() > 1:
        check_agreement(facts_of_run(cfg, datasets, model))


def check_agreement(facts: dict[str, Any]) -> None:
    """Compare every rank's facts with rank 0's.

    Args:
        facts: by names like ``setting run.init_lr``, whose first word is a key of ``ADVICE``.

    Raises:
        UserError: on all ranks: the first facts that differ, each with its values and the ranks that have them.
    """
    hosts, everyone = zip(*gather_objects((socket.gethostname(), facts)), strict=True)
    message = first_differences(everyone, hosts)
    if message is not None:
        raise UserError(message)


def first_differences(everyone: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> str | None:
    """What to tell about ranks with these facts; None where all have the same.

    Example:
        >>> first_differences([{"setting run.seed": 1}, {"setting run.seed": 2}], ["a", "b"])
        'the ranks differ in setting run.seed: 1 on rank 0 (a), 2 on rank 1 (b). Start every rank with the same YAML and options.'
    """
    names = dict.fromkeys(name for facts in everyone for name in facts)
    different = [name for name in names if any(facts.get(name) != everyone[0].get(name) for facts in everyone)]
    if not different:
        return None
    shown = "; ".join(f"{name}: {_values(name, everyone, hosts)}" for name in different[:SHOWN])
    more = f"; and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
    return f"the ranks differ in {shown}{more}. {ADVICE[different[0].split()[0]]}."


def facts_of_run(cfg: Any, datasets: Any = None, model: nn.Module | None = None) -> dict[str, Any]:
    """What must be the same on all ranks.

    Weights are left out: rank 0's are sent to the others.

    Args:
        cfg: LAVIS's configuration.
        datasets: data sets in dictionaries of any depth, by data set and split.
        model: its parameters' names and shapes count.
    """
    facts: dict[str, Any] = {"library python": ".".join(platform.python_version_tuple()[:2]), "library lavis_mafa": __version__}
    facts |= {f"library {name}": _version(name) for name in LIBRARIES}
    settings = _flat("", OmegaConf.to_container(cfg.config, resolve=True))
    facts |= {f"setting {key}": value for key, value in settings if not any(fnmatch.fnmatch(key, local) for local in LOCAL)}
    for name, dataset in _flat("", datasets or {}):
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


def _flat(before: str, tree: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, Mapping) or not tree:
        yield before, tree
        return
    for key, value in tree.items():
        yield from _flat(f"{before}.{key}" if before else str(key), value)


def _values(name: str, everyone: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> str:
    ranks_of: dict[str, list[int]] = {}
    for rank, facts in enumerate(everyone):
        ranks_of.setdefault(str(facts.get(name)), []).append(rank)
    return ", ".join(f"{value} on {_ranks(ranks, hosts)}" for value, ranks in ranks_of.items())


def _ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """``rank 3 (node7)`` or ``ranks 0-2, 5``."""
    if len(ranks) == 1:
        return f"rank {ranks[0]} ({hosts[ranks[0]]})"
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return "ranks " + ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
