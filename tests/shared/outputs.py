"""What a run of the command line leaves behind, as tests read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def only_run(folder: Path) -> Path:
    (run,) = sorted((folder / "output").glob("2*"))
    return run


def newest_run(folder: Path) -> Path:
    return max((folder / "output").glob("2*"), key=lambda path: path.stat().st_mtime)


def metrics(run: Path) -> list[dict[str, Any]]:
    return json_lines(run / "metrics.jsonl")


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["model"]


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_same_run(one: Path, other: Path) -> None:
    """Every number of the last checkpoints (weights, optimizer, queue, order, random states), and all records but the times."""
    for pattern in ("metrics.jsonl", "evaluation.jsonl"):
        first, second = ([timeless(r) for r in json_lines(run / pattern)] if (run / pattern).exists() else [] for run in (one, other))
        assert first == second, pattern
    last = max(int(path.name.split(".")[0].split("_")[1]) for path in one.glob("checkpoint_*.rank0.pth"))
    names = {path.name for pattern in (f"checkpoint_{last}.*pth", "checkpoint_best.pth") for path in one.glob(pattern)}
    for name in names:
        first, second = (torch.load(run / name, weights_only=True) for run in (one, other))
        for content in (first, second):
            content.pop("config", None)  # says where the run went on
        assert_same(first, second, name)


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if "per_second" not in key}


def assert_same(one: Any, other: Any, where: str) -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for place, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}/{place}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where
