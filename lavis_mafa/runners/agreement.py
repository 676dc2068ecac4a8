"""All ranks must have been started with the same libraries, settings and data: a job that differs is refused before it trains."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import platform
import socket
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lavis_mafa import __version__
from lavis_mafa.config.read import flat, plain
from lavis_mafa.datasets.fingerprint import fingerprints, parts
from lavis_mafa.distributed import gather_objects, world_size
from lavis_mafa.errors import UserError

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
