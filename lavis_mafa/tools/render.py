"""The templates of the folder ``page``, which reports and ``explore`` are made of, and the tables in them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

TEMPLATES = Path(__file__).with_name("page")


def render(template: str, **values: Any) -> str:
    """A template of the folder ``page``; everything in it is escaped."""
    loader = jinja2.FileSystemLoader(TEMPLATES, encoding="utf-8")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**values)


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
