"""The templates of the folder ``page``, which reports and ``explore`` are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

TEMPLATES = Path(__file__).with_name("page")


def render(template: str, **values: Any) -> str:
    """A template of the folder ``page``; everything in it is escaped."""
    loader = jinja2.FileSystemLoader(TEMPLATES, encoding="utf-8")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**values)
