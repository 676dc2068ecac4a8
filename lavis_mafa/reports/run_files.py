"""Reading back what a run wrote. Reports use these files and the data set, nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lavis_mafa.common.errors import UserError


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``, in the order of training."""
    return _json_lines(run / "metrics.jsonl")


def read_evaluations(run: Path) -> dict[str, dict[str, Any]]:
    """The last evaluation of each split."""
    return {record["split"]: record for record in _json_lines(run / "evaluation.jsonl")}


def read_connections(run: Path) -> pa.Table:
    """All recorded verdicts of all epochs and ranks."""
    files = sorted((run / "connections").glob("epoch_*_rank_*.parquet"))
    if not files:
        raise UserError(f"{run} has no connections/*.parquet; they are written while model.ecm.enabled is true.")
    return pa.concat_tables([pq.read_table(file) for file in files]).unify_dictionaries()


def last_checkpoint(run: Path) -> Path:
    """The newest numbered checkpoint."""
    files = [f for f in run.glob("checkpoint_*.pth") if ".rank" not in f.name and "best" not in f.name]
    if not files:
        raise UserError(f"{run} has no checkpoint.")
    return max(files, key=lambda f: f.stat().st_mtime)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path} is missing: is {path.parent} the folder of a finished run?")
    return [json.loads(line) for line in path.read_text().splitlines()]
