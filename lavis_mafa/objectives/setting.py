"""A setting is declared once: its type, default, meaning, choices and range stand beside each other, in a dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any


def setting(
    default: Any,
    meaning: str = "",
    paper: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Collection[str] = (),
    path: str = "",
) -> Any:
    """A field of a dataclass of settings.

    Args:
        default: a value, a class to make it by, or ``...`` for a setting that must be given.
        meaning: a cell of docs/configuration.md; ``paper``: the table or section it comes from.
        low, high: the range of a number, both included.
        choices: the texts that are allowed; in a list, of each entry.
        path: what a text names: ``file``, ``weights`` (a file or a folder), ``name`` (a hub name or a path), or ``folder``.

    Example:
        >>> @dataclasses.dataclass
        ... class Smoothing:
        ...     alpha: float = setting(0.5, "of S-ITC; 0 is off", "MAFA eq. 5", low=0, high=1)
        >>> Smoothing().alpha
        0.5
    """
    metadata = {"meaning": meaning, "paper": paper, "low": low, "high": high, "choices": choices, "path": path}
    if default is ...:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def as_in(owner: type, name: str, default: Any, meaning: str = "", paper: str = "") -> Any:
    """The setting ``owner.name`` in a subclass with another default, and where it means something else another meaning."""
    declared = dict(owner.__dataclass_fields__[name].metadata)  # type: ignore[attr-defined]
    if meaning:
        declared |= {"meaning": meaning, "paper": paper}
    return setting(default, **declared)
