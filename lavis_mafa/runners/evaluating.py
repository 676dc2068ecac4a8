"""Evaluating one split with any LAVIS task, and writing down what came out."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from lavis_mafa.common.distributed import broadcast_object, rank

logger = logging.getLogger(__name__)


@torch.no_grad()
def evaluate_split(
    task: Any, model: Any, loader: Any, dataset: Any, split: str, epoch: int | str, folder: Path, cuda_enabled: bool
) -> dict[str, Any] | None:
    """The task's figures on all ranks, appended to ``evaluation.jsonl``; None where the task has none."""
    model.eval()
    task.before_evaluation(model=model, dataset=dataset)
    result = task.evaluation(model, loader, cuda_enabled=cuda_enabled)
    # LAVIS's retrieval has a result on rank 0 alone; the other ranks must not miss the broadcast
    stats = None if result is None else task.after_evaluation(val_result=result, split_name=split, epoch=epoch)
    stats = broadcast_object(stats)
    if rank() == 0 and stats is not None:
        record = {k: (float(v) if isinstance(v, int | float) or hasattr(v, "item") else v) for k, v in stats.items()}
        with open(folder / "evaluation.jsonl", "a") as file:
            file.write(json.dumps({"split": split, "epoch": epoch, **record}) + "\n")
        shown = {name: f"{value:.2f}" if isinstance(value, float) else value for name, value in record.items()}
        logger.info("%s: %s", split, "  ".join(f"{name} {text}" for name, text in shown.items() if isinstance(text, str)))
    return stats
