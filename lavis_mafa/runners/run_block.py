"""``run:`` as a typed block, for our task and for LAVIS's."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from omegaconf import OmegaConf

from lavis_mafa.config.schema import RunBlock, typed_block


def run_settings(run: Any, ours: bool) -> RunBlock:
    """For our tasks the block is checked; LAVIS's own YAMLs keep their keys, and those we know are taken.

    Args:
        run: the ``run`` node.
        ours: is the task one of ours.
    """
    if ours:
        block: RunBlock = typed_block("run", run)
        return block
    known = {f.name for f in dataclasses.fields(RunBlock)} - {"grit"}
    values: dict[str, Any] = {k: run[k] for k in map(str, run) if k in known}
    values = {k: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v for k, v in values.items()}
    on_gpu = torch.cuda.is_available() and str(run.get("device", "cuda")).startswith("cuda")
    # LAVIS's defaults, not ours
    values = {
        "precision": "fp16" if run.get("amp", False) and on_gpu else "fp32",
        "lr_sched": "linear_warmup_cosine_lr",
        "warmup_lr": -1,
        "warmup_steps": 0,
        "min_lr": 0.0,
        "use_dist_eval_sampler": True,
        **values,
    }
    floats = ("init_lr", "min_lr", "warmup_lr", "weight_decay", "lr_decay_rate")  # YAML reads 1e-4 as text
    values.update({name: float(values[name]) for name in floats if values.get(name) is not None})
    return RunBlock(**values)
