"""Reading back what a run wrote. Reports use these files and the data set, nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf

from lavis_mafa.config.read import read_yaml
from lavis_mafa.errors import UserError


@dataclass(frozen=True)
class Run:
    """One run folder, read whole. What a run did not write is empty, or None for the connections."""

    name: str
    folder: Path
    config: DictConfig
    metrics: list[dict[str, Any]]
    evaluations: dict[str, dict[str, Any]]
    connections: pa.Table | None


def open_runs(folders: list[Path]) -> list[Run]:
    """The runs, each named by the shortest end of its path that tells them apart.

    Raises:
        UserError: a folder is not there, or holds neither metrics nor an evaluation.
    """
    distinct = list({folder.resolve(): folder for folder in folders}.values())
    names = _names([folder.resolve() for folder in distinct])
    return [_open_run(folder, name) for folder, name in zip(distinct, names, strict=True)]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``, in the order of training."""
    return _json_lines(run / "metrics.jsonl")


def last_epoch(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Each figure's average over the steps of the last epoch; a record stands for the steps since the one before it."""
    last = [record for record in metrics if record["epoch"] == metrics[-1]["epoch"]]
    steps = [record["step"] - before for before, record in zip([0, *(r["step"] for r in last)], last, strict=False)]
    found: dict[str, list[tuple[float, int]]] = {}
    for record, count in zip(last, steps, strict=True):
        for name, value in record.items():
            if isinstance(value, int | float):
                found.setdefault(name, []).append((value, count))
    return {name: sum(v * n for v, n in pairs) / sum(n for _, n in pairs) for name, pairs in found.items()}


def read_evaluations(run: Path) -> dict[str, dict[str, Any]]:
    """The last evaluation of each split."""
    return {record["split"]: record for record in _json_lines(run / "evaluation.jsonl")}


def read_connections(run: Path) -> pa.Table:
    """All recorded verdicts of all epochs and ranks."""
    files = sorted((run / "connections").glob("epoch_*_rank_*.parquet"))
    if not files:
        raise UserError(f"{run} has no connections/*.parquet; they are written while model.ecm.enabled is true.")
    tables = []
    for file in files:
        try:
            tables.append(pq.read_table(file))
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{file} is not readable as Parquet: {' '.join(str(error).split())}") from error
    return pa.concat_tables(tables).unify_dictionaries()


def last_checkpoint(run: Path) -> Path:
    """The newest numbered checkpoint."""
    files = [f for f in run.glob("checkpoint_*.pth") if ".rank" not in f.name and "best" not in f.name]
    if not files:
        raise UserError(f"{run} has no checkpoint.")
    return max(files, key=lambda f: f.stat().st_mtime)


def _open_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the folder of a run, such as output/20250131120000.")
    metrics, evaluation = folder / "metrics.jsonl", folder / "evaluation.jsonl"
    if not any(file.is_file() and file.stat().st_size for file in (metrics, evaluation)):
        inside = sorted(file.parent for file in (*folder.glob("*/metrics.jsonl"), *folder.glob("*/evaluation.jsonl")))
        hint = f" Did you mean {inside[-1]}?" if inside else " A run writes its first record after run.log_freq steps."
        raise UserError(f"{folder} has no metrics.jsonl with records, and no evaluation either.{hint}")
    return Run(
        name=name,
        folder=folder,
        config=_config(folder / "config.yaml"),
        metrics=read_metrics(folder) if metrics.is_file() else [],
        evaluations=read_evaluations(folder) if evaluation.is_file() else {},
        connections=read_connections(folder) if any((folder / "connections").glob("epoch_*_rank_*.parquet")) else None,
    )


def _config(path: Path) -> DictConfig:
    """The run's settings; empty where it kept none."""
    if not path.is_file():
        return OmegaConf.create({})
    config = read_yaml(path)
    return config if isinstance(config, DictConfig) else OmegaConf.create({})


def _names(folders: list[Path]) -> list[str]:
    """``output/mafa/20250131120000`` is ``mafa`` while no other is, else ``mafa/20250131120000``, else the whole path."""
    for name in (lambda f: f.parent.name if f.name.isdigit() else f.name, lambda f: f"{f.parent.name}/{f.name}", str):
        names = [name(folder) or str(folder) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path} is missing: is {path.parent} the folder of a finished run?")
    lines = path.read_text(encoding="utf-8").splitlines()
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break  # a run that was killed, or is still writing, ends in half a line
            raise UserError(f"{path}, line {number}: not readable as JSON ({error}).") from error
    return records
