"""Evaluating one split with any LAVIS task, and writing down what came out."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lavis_mafa.distributed import broadcast_object, rank

logger = logging.getLogger(__name__)


@torch.no_grad()
def evaluate_split(
    task: Any, model: Any, loader: Any, dataset: Any, split: str, epoch: int | str, folder: Path, cuda_enabled: bool
) -> dict[str, Any] | None:
    """The task's figures on all ranks, appended to ``evaluation.jsonl``; None where the task has none."""
    model.eval()
    task.before_evaluation(model=model, dataset=dataset)
    with k_test_within(task, model, dataset):
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


@contextlib.contextmanager
def k_test_within(task: Any, model: Any, dataset: Any) -> Iterator[None]:
    """Inside, ``run.k_test`` is no more than a gallery has: LAVIS's models take that for granted, ours look themselves."""
    scores = getattr(type(model), "compute_sim_matrix", None)
    settings = getattr(task, "cfg", None) or getattr(task, "run", None)
    wanted = getattr(settings, "k_test", None)
    if scores is None or not scores.__module__.startswith("lavis.") or wanted is None or not hasattr(dataset, "text"):
        yield
        return
    most = min(len(dataset.image), len(dataset.text))
    if wanted > most:
        logger.warning(
            "run.k_test is %d, but the gallery has %d images and %d texts: the matching head ranks %d candidates of each",
            *(wanted, len(dataset.image), len(dataset.text), most),
        )
    settings.k_test = min(wanted, most)  # type: ignore[union-attr]
    try:
        yield
    finally:
        settings.k_test = wanted  # type: ignore[union-attr]
