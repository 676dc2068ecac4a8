"""``run:`` of a task of LAVIS's as our typed block, and the folder a run writes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lavis_mafa.config.read import plain
from lavis_mafa.config.schema import RunBlock, typed_block
from lavis_mafa.errors import UserError
from lavis_mafa.runners.resuming import lock, newest_good, rewind, same_runs, unlock


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


def open_folder(parent: Path, name: str, settings: RunBlock, config: dict[str, Any]) -> tuple[Path, Path | None]:
    """The folder of a run, locked; with ``resume_ckpt_path: auto`` the one it goes on in, put back to the checkpoint it goes on from.

    Raises:
        UserError: it cannot be made, or is in use.
    """
    for folder in same_runs(parent, config) if settings.resume_ckpt_path == "auto" and not settings.evaluate else ():
        lock(folder)  # before looking: who has it may be saving
        if (checkpoint := newest_good(folder)) is not None:
            rewind(folder, checkpoint)
            return folder, checkpoint
        unlock(folder)
    folder = new_folder(parent, name)
    lock(folder)
    return folder, None


def new_folder(parent: Path, name: str) -> Path:
    """Make ``parent/name``, or ``name_2``, ``name_3``, ... where it exists: a run never writes into another's folder.

    Raises:
        UserError: it cannot be made.
    """
    try:
        for number in range(1, 10_000):
            folder = parent / (name if number == 1 else f"{name}_{number}")
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                if folder.is_dir():
                    continue
                raise
            (folder / "result").mkdir()
            return folder
    except OSError as error:
        raise UserError(f"run.output_dir: cannot write in {parent}: {error.strerror}.") from error
    raise UserError(f"run.output_dir: {parent} holds 10,000 runs named {name}; choose another one.")
