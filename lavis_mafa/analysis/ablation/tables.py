"""The papers' ablation tables: which rows they have, and which options these are of a base, large or small."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lavis_mafa.common.errors import UserError, did_you_mean
from lavis_mafa.common.typed import typed_block

TABLES = Path(__file__).resolve().parents[2] / "configs" / "ablations.yaml"
RELATIVE = re.compile(r"([\w.]+)=([\d.]+)\*([a-z][\w.]*)")  # run.max_epoch=0.5*run.max_epoch


@dataclass(frozen=True)
class Row:
    """One row of a paper's table: options of its base, and the paper's figures by metric."""

    number: int
    name: str
    paper: dict[str, float]
    options: list[str]


@dataclass(frozen=True)
class Table:
    """A paper's table: ``base`` is the YAML whose options the rows are, ``finetune`` the one that its figures are taken after."""

    key: str
    title: str
    base: str
    finetune: str
    rows: list[Row]


def load_tables() -> dict[str, Table]:
    """Every table of ``configs/ablations.yaml`` by its key."""
    tables = {}
    content: Any = OmegaConf.to_container(OmegaConf.load(TABLES))
    for key, block in content.items():
        always = block.get("always", [])
        rows = [
            Row(number, row["name"], dict(zip(block["columns"], row["paper"], strict=True)), [*always, *row["options"]])
            for number, row in enumerate(block["rows"], start=1)
        ]
        tables[str(key)] = Table(str(key), block["title"], block["base"], block["finetune"], rows)
    return tables


def find_table(name: str) -> Table:
    """One table.

    Raises:
        UserError: there is none of this name; the message has the nearest.
    """
    tables = load_tables()
    if name not in tables:
        raise UserError(f"--table is {name!r}, which is none.{did_you_mean(name, tables)} Known: {', '.join(tables)}.")
    return tables[name]


def concrete(options: Sequence[str], config: DictConfig) -> list[str]:
    """Options with what is relative to the base replaced by its value.

    Args:
        options: ``KEY=VALUE``, or ``KEY=F*KEY``, F times another setting of the base.
        config: the base as :func:`check_yaml` gives it.

    Example:
        >>> concrete(["run.max_epoch=0.5*run.max_epoch"], config)  # a base of 20 epochs
        ['run.max_epoch=10']
    """
    blocks = {"model": typed_block("model", config.model), "run": typed_block("run", config.run)}
    result = []
    for option in options:
        if found := RELATIVE.fullmatch(option):
            first, *path = found[3].split(".")
            value: Any = blocks[first]
            for part in path:
                value = getattr(value, part)
            value = max(1, round(float(found[2]) * value)) if isinstance(value, int) else float(found[2]) * value
            option = f"{found[1]}={value}"
        result.append(option)
    return result
