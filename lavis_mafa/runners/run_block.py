"""``run:`` of one of LAVIS's tasks as our typed block."""

from __future__ import annotations

from typing import Any

import torch

from lavis_mafa.config.read import plain
from lavis_mafa.config.schema import RunBlock, typed_block


def run_settings(run: Any, ours: bool) -> RunBlock:
    """The typed block of one of our tasks, or what we know of the block of one of LAVIS's, over LAVIS's defaults.

    Args:
        run: the ``run`` node, or a block that is typed already.
        ours: is the task one of ours?
    """
    if ours:
        return typed_block("run", run)
    on_gpu = torch.cuda.is_available() and str(run.get("device", "cuda")).startswith("cuda")
    values = {
        "precision": "fp16" if run.get("amp", False) and on_gpu else "fp32",
        "lr_sched": "linear_warmup_cosine_lr",
        "warmup_lr": -1,
        "warmup_steps": 0,
        "min_lr": 0.0,
        "use_dist_eval_sampler": True,
    }
    known = RunBlock.__dataclass_fields__.keys() - {"grit", "task"}
    values |= {key: value for key, value in plain(run).items() if key in known}
    block: RunBlock = typed_block("run", values)
    block.task = run.get("task", block.task)
    return block
