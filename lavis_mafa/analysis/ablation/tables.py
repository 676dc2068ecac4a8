"""The papers' ablation tables: which rows they have, and which options these are of a base, large or small."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lavis_mafa.config.schema import typed_block
from lavis_mafa.errors import UserError, did_you_mean

TABLES = Path(__file__).resolve().parents[2] / "configs" / "ablations.yaml"
RELATIVE = re.compile(r"([\w.]+)=([\d.]+)\*([a-z][\w.]*)")  # run.max_epoch=0.5*run.max_epoch
BENCHMARKS = {"coco": "COCO's 5K test split", "flickr": "Flickr30K's 1K test split"}


@dataclass(frozen=True)
class Row:
    """One row of a paper's table: options of its base, and the paper's figures by benchmark and metric.

    ``finetune_options`` are of the YAML that it is fine-tuned with; an ``oracle`` row takes its Con-D from the user.
    """

    number: int
    name: str
    paper: dict[str, dict[str, float]]
    options: list[str]
    finetune_options: list[str] = field(default_factory=list)
    oracle: bool = False


@dataclass(frozen=True)
class Table:
    """A paper's table: ``base`` is the YAML whose options the rows are.

    ``finetune`` has by benchmark (``coco``, ``flickr``) the YAML that its figures are taken after, ``con_d`` the two YAMLs that make
    Con-D, one after the other.
    """

    key: str
    title: str
    base: str
    finetune: dict[str, str]
    rows: list[Row]
    con_d: list[str] = field(default_factory=list)
    plotted: bool = False  # over the search space, as MAFA's Figure 2


def load_tables() -> dict[str, Table]:
    """Every table of ``configs/ablations.yaml`` by its key."""
    content: Any = OmegaConf.to_container(OmegaConf.load(TABLES))
    return {str(key): _table(str(key), block) for key, block in content.items() if not key.startswith("_")}


def _table(key: str, block: dict[str, Any]) -> Table:
    always = block.get("always", [])
    rows = []
    for number, row in enumerate(block["rows"], start=1):
        paper = {name: dict(zip(block["columns"][name], row[name], strict=True)) for name in BENCHMARKS if name in row}
        options = [*always, *row.get("options", [])]
        rows.append(Row(number, row["name"], paper, options, row.get("finetune_options", []), bool(row.get("oracle", False))))
    finetune = {name: block["finetune"][name] for name in block["columns"]}
    return Table(key, block["title"], block["base"], finetune, rows, block.get("con_d", []), bool(block.get("plotted", False)))


def find_table(name: str) -> Table:
    """One table.

    Raises:
        UserError: there is none of this name; the message has the nearest.
    """
    tables = load_tables()
    if name not in tables:
        raise UserError(f"--table is {name!r}, which is none.{did_you_mean(name, tables)} Known: {', '.join(tables)}.")
    return tables[name]


def fits(row: Row, config: DictConfig) -> bool:
    """Has the base the data sets whose annotations a row exchanges (4M-Clean for 4M-Noisy)?"""
    named = {option.split(".")[1] for option in row.options if option.startswith("datasets.")}
    return named <= set(map(str, config.datasets))


def concrete(options: Sequence[str], config: DictConfig) -> list[str]:
    """Options with what is relative to the base replaced by its value.

    Args:
        options: ``KEY=VALUE``, or ``KEY=F*KEY``, F times another setting of the base; a search space becomes the nearest one that
            the base allows: a divisor of its ``queue_size`` that holds a batch.
        config: the base as :func:`check_yaml` gives it.

    Example:
        >>> concrete(["run.max_epoch=0.5*run.max_epoch"], config)  # a base of 20 epochs
        ['run.max_epoch=10']
    """
    blocks = {"model": typed_block("model", config.model), "run": typed_block("run", config.run)}
    result: list[str] = []
    for option in options:
        if found := RELATIVE.fullmatch(option):
            first, *path = found[3].split(".")
            value: Any = blocks[first]
            for part in path:
                value = getattr(value, part)
            value = max(1, round(float(found[2]) * value)) if isinstance(value, int) else float(found[2]) * value
            if found[1] == "run.grit.search_space":
                value = _allowed_space(value, blocks["run"], result)
            option = f"{found[1]}={value}"
        result.append(option)
    return result


def _allowed_space(wanted: int, run: Any, before: Sequence[str]) -> int:
    """The divisor of the queue that is nearest to ``wanted`` and at least a batch, as the options before it have it."""
    given = [int(option.split("=")[1]) for option in before if option.startswith("run.batch_size_train=")]
    batch, queue = (given or [run.batch_size_train])[-1], run.grit.queue_size
    divisors = [d for d in range(1, queue + 1) if queue % d == 0 and d >= batch]
    return min(divisors or [queue], key=lambda d: abs(d - wanted))
