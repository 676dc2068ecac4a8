"""All ranks must have been started with the same libraries, settings and data: a job that differs is refused before it trains."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import platform
import socket
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from lavis_mafa import __version__
from lavis_mafa.common.distributed import gather_objects, world_size
from lavis_mafa.common.errors import UserError
from lavis_mafa.common.fingerprint import fingerprints, parts

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
