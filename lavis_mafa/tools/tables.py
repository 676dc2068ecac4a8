"""A table of a page, and how its numbers are written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Table:
    """``best`` holds the (row, column) of every column's largest value, where several rows have one."""

    head: list[str]
    rows: list[list[str]]
    caption: str
    best: set[tuple[int, int]] = field(default_factory=set)


def number(value: float | None, share: bool = False, digits: int = 3) -> str:
    """A number for a cell; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.1%}" if share else f"{value:.{digits}f}"
