"""Reading back what a run wrote. Reports use these files and the data set, nothing else."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf

from lavis_mafa.config.read import read_yaml
from lavis_mafa.datasets.ids import pc
from lavis_mafa.errors import UserError
from lavis_mafa.files import runs_with

QUERIES = "_queries.parquet"
MINED, COUNTED = "mine.json", "count.json"


@dataclass(frozen=True)
class Run:
    """One run folder, read whole. What a run did not write is empty, or None for the connections.

    A folder of ``mine`` or ``count-false-negatives`` is one too; what these found is in ``mined`` and ``counted``.
    """

    name: str
    folder: Path
    config: DictConfig
    metrics: list[dict[str, Any]]
    evaluations: dict[str, dict[str, Any]]
    connections: pa.Table | None
    mined: dict[str, Any] | None = None
    counted: dict[str, Any] | None = None

    @property
    def judge(self) -> str:
        """Who judged its connections."""
        return "Con-D" if self.mined is None else str(self.mined["judge"])


def open_runs(folders: list[Path]) -> list[Run]:
    """The runs, each named by the shortest end of its path that tells them apart; raises UserError where a folder is none of a run."""
    distinct = list({folder.resolve(): folder for folder in folders}.values())
    names = _names([folder.resolve() for folder in distinct])
    return [_open_run(folder, name) for folder, name in zip(distinct, names, strict=True)]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``, in the order of training; none where there is no such file."""
    return _json_lines(run / "metrics.jsonl")


def read_evaluations(run: Path) -> dict[str, dict[str, Any]]:
    """The last evaluation of each split; none where nothing was evaluated."""
    return {record["split"]: record for record in _json_lines(run / "evaluation.jsonl")}


def run_evaluations(run: Path, epochs: set[Any]) -> dict[str, dict[str, float]]:
    """The metrics of each split's last evaluation at one of the ``epochs``: its number, or a word such as "best"."""
    records = [record for record in _json_lines(run / "evaluation.jsonl") if record["epoch"] in epochs]
    return {
        record["split"]: {key: value for key, value in record.items() if isinstance(value, float) and math.isfinite(value)}
        for record in records
    }


def read_connections(run: Path) -> pa.Table:
    """All recorded verdicts of all epochs and ranks; raises UserError where there are none, or a file is damaged."""
    tables = []
    for file in _connection_files(run):
        try:
            tables.append(pq.read_table(file))
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{file} is not readable as Parquet: {' '.join(str(error).split())}") from error
    if not tables:
        raise UserError(f"{run} has no connections/*.parquet; they are written while model.ecm.enabled is true.")
    return pa.concat_tables(tables).unify_dictionaries()


def read_queries(run: Path, split: str) -> pa.Table:
    """The metrics of every query of a split's last evaluation (:func:`lavis_mafa.tasks.pretrain.write_queries`).

    Raises:
        UserError: there are none, or the file is damaged.
    """
    file = run / "result" / f"{split}{QUERIES}"
    try:
        return pq.read_table(file)
    except FileNotFoundError:
        known = ", ".join(query_splits(run)) or "none"
        raise UserError(
            f"{run} has no metrics of single queries of the split {split!r} (result/{file.name}); it has those of: {known}. They are "
            "written by every retrieval evaluation; an older run gets them from `lavis-mafa evaluate`."
        ) from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} is not readable as Parquet: {' '.join(str(error).split())}") from error


def query_splits(run: Path) -> list[str]:
    """The splits that :func:`read_queries` finds."""
    return sorted(file.name.removesuffix(QUERIES) for file in (run / "result").glob(f"*{QUERIES}"))


def last_epoch(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Each metric's average over the steps of the last epoch; a record stands for the steps since the one before it."""
    last = [record for record in metrics if record["epoch"] == metrics[-1]["epoch"]]
    steps = [record["step"] - before for before, record in zip([0, *(r["step"] for r in last)], last, strict=False)]
    found: dict[str, list[tuple[float, int]]] = {}
    for record, count in zip(last, steps, strict=True):
        for name, value in record.items():
            if isinstance(value, int | float):
                found.setdefault(name, []).append((value, count))
    return {name: sum(v * n for v, n in pairs) / sum(n for _, n in pairs) for name, pairs in found.items()}


def wall_seconds(run: Path) -> float:
    """How long a finished run has trained, by its log, and was evaluated after that, by the times of its files.

    Neither waiting between an interruption and going on is in it, nor starting up.
    """
    records, before, seconds = read_metrics(run), 0, 0.0
    for record in records:
        seconds += max(0, record["samples_seen"] - before) / record["samples_per_second"]
        before = record["samples_seen"]
    trained, scored = (run / name for name in ("metrics.jsonl", "evaluation.jsonl"))
    if trained.is_file() and scored.is_file():
        seconds += max(0.0, scored.stat().st_mtime - trained.stat().st_mtime)
    return seconds


def _open_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the folder of a run, such as output/20250131120000.")
    if (folder / MINED).is_file():
        return _open_mined(folder, name)
    if (folder / COUNTED).is_file():
        return _open_counted(folder, name)
    metrics, evaluations = read_metrics(folder), read_evaluations(folder)
    if not metrics and not evaluations:
        inside = sorted({run for file in ("metrics.jsonl", "evaluation.jsonl", MINED, COUNTED) for run in runs_with(folder, file)})
        hint = f" Did you mean {inside[-1]}?" if inside else " A run writes its first record after run.log_freq steps."
        raise UserError(f"{folder} has no metrics.jsonl with records, no evaluation, and no {MINED} or {COUNTED}.{hint}")
    config = read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else None
    return Run(
        name=name,
        folder=folder,
        config=config if isinstance(config, DictConfig) else OmegaConf.create({}),
        metrics=metrics,
        evaluations=evaluations,
        connections=read_connections(folder) if _connection_files(folder) else None,
    )


def _open_mined(folder: Path, name: str) -> Run:
    """What ``lavis-mafa mine`` left, as a run that trained on the data it searched: the first rows of its ``pairs.parquet``.

    Its connections have two further columns: ``outcome``, and the ``caption`` that was judged, of a row that may have several.
    """
    try:
        results = json.loads((folder / MINED).read_text(encoding="utf-8"))
        rules, rows, images = results["settings"], results["data"], results["images"]
        table = pq.read_table(folder / "connections.parquet")
        limit = rules["threshold"] if rules.get("guide_margin") is None else None  # of a guide it is another one for each anchor
        own = table["own_probability"]
        above = pc.greater(table["probability"], pc.subtract(own, rules["guide_margin"]) if limit is None else limit)
        if rules["margin"]:  # else below nothing: a guide's cosines may be negative
            above = pc.and_(above, pc.greater_equal(table["probability"], pc.multiply(own, rules["margin"])))
        further = {column: table[column] for column in ("outcome", "caption")}
    except (pa.ArrowInvalid, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no whole result of mine: {' '.join(str(error).split())}") from error
    verdict = pc.if_else(above, "positive", "negative")  # Con-D's, whatever became of the pair
    no_epoch = pa.array([-1] * len(table), pa.int64())
    parts = {column: table[column] for column in ("direction", "image", "text", "probability", "own_probability")}
    connections = pa.table({**parts, "verdict": verdict, "epoch": no_epoch, "step": no_epoch, **further})
    connections = connections.filter(pc.and_(pc.greater_equal(table["image"], 0), pc.greater_equal(table["text"], 0)))
    info = {"annotations": {"train": {"storage": str(folder.resolve() / "pairs.parquet")}}, "max_images": rows}
    info["images"] = {"storage": images or str(folder.resolve()), "allow_absolute_paths": True}
    config = {"model": {"ecm": {"threshold": limit, "ambiguous_from": limit}}, "datasets": {"grit_pairs": {"build_info": info}}}
    return Run(name, folder, OmegaConf.create(config), [], {}, connections, mined=results)


def _open_counted(folder: Path, name: str) -> Run:
    try:
        results = json.loads((folder / COUNTED).read_text(encoding="utf-8"))
        missing = [key for key in ("judge", "margin", "meaningless", "medians", "samples", "ways") if key not in results]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / COUNTED} is not readable as JSON: {' '.join(str(error).split())}") from error
    if missing or not results["ways"]:
        raise UserError(f"{folder / COUNTED} holds no whole result of count-false-negatives: no {', '.join(missing) or 'ways'}.")
    return Run(name, folder, OmegaConf.create({}), [], {}, None, counted=results)


def _connection_files(run: Path) -> list[Path]:
    return sorted((run / "connections").glob("epoch_*_rank_*.parquet"))


def _names(folders: list[Path]) -> list[str]:
    """``output/mafa/20250131120000`` is ``mafa`` while no other is, else ``mafa/20250131120000``, else the whole path."""
    for name in (lambda f: f.parent.name if f.name.isdigit() else f.name, lambda f: f"{f.parent.name}/{f.name}", str):
        names = [name(folder) or str(folder) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _json_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break  # a run that was killed, or is still writing, ends in half a line
            raise UserError(f"{path}, line {number}: not readable as JSON ({error}).") from error
    return records
