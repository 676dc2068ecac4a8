"""What a run of the command line leaves behind, as tests read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def only_run(folder: Path) -> Path:
    (run,) = sorted((folder / "output").iterdir())
    return run


def newest_run(folder: Path) -> Path:
    return max((folder / "output").iterdir(), key=lambda path: path.stat().st_mtime)


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
