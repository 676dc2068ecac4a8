"""A run's files on disk: whole checkpoints that resume, kept in bounded number, with one state file a rank beside each."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lavis.models.blip2_models.blip2 import Blip2Base
from torch import nn

from lavis_mafa.common.distributed import barrier
from lavis_mafa.common.errors import UserError
from lavis_mafa.common.weights import load_exactly, read_checkpoint, write_atomically


class CheckpointFolder:
    """Writes ``checkpoint_NAME.pth`` (LAVIS's layout) and ``checkpoint_NAME.rankR.pth`` (queue, order, random states).

    Args:
        folder: the run's output directory.
        keep: how many of the numbered checkpoints stay; the best one always does.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder, self.keep = folder, keep
        self.written: list[str] = []

    def path(self, name: str) -> Path:
        return self.folder / f"checkpoint_{name}.pth"

    def save(self, name: str, content: dict[str, Any] | None, rank_state: dict[str, Any] | None, rank: int) -> None:
        """Each rank saves its own state first, then rank 0 (the one with ``content``) the weights: a complete file names the
        end of a complete save."""
        if rank_state is not None:
            write_atomically(rank_state, rank_file(self.path(name), rank))
        barrier()  # the weights are the sign that all ranks' states are there
        if content is not None:
            write_atomically(content, self.path(name))
        barrier()  # and nothing older goes before they are
        if name != "best" and name not in self.written:
            self.written.append(name)
            for old in self.written[: -self.keep]:
                rank_file(self.path(old), rank).unlink(missing_ok=True)
                if content is not None:
                    self.path(old).unlink(missing_ok=True)
            del self.written[: -self.keep]


def rank_file(checkpoint: Path, rank: int) -> Path:
    return checkpoint.with_name(f"{checkpoint.stem}.rank{rank}.pth")


def read_resumable(path: str | Path, rank: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A checkpoint and this rank's state; the latter is None for LAVIS's own checkpoints, which have none.

    Raises:
        UserError: a file is missing or no checkpoint.
    """
    content = read_checkpoint(path, "run.resume_ckpt_path")
    for key in ("model", "optimizer", "epoch"):
        if key not in content:
            raise UserError(f"run.resume_ckpt_path: {path} has no {key!r}; only a checkpoint of a run can be resumed.")
    if "next_epoch" not in content:
        return content, None
    state_path = rank_file(Path(path), rank)
    if not state_path.is_file():
        raise UserError(f"run.resume_ckpt_path: {state_path.name} is missing beside {path}; it holds rank {rank}'s order and queue.")
    return content, read_checkpoint(state_path, "run.resume_ckpt_path")


def load_model(model: nn.Module, state: dict[str, Any], source: str | Path) -> None:
    """Load a run's weights. LAVIS leaves all frozen weights out of its checkpoints, we those with a file of their own."""
    parameters = model.named_parameters(remove_duplicate=False)  # a tied weight has two names
    frozen = tuple(name for name, parameter in parameters if not parameter.requires_grad)
    may_miss = unsaved_parts(model) if any(name in state for name in frozen) else frozen
    load_exactly(model, state, f"run.resume_ckpt_path: {source}", may_miss=may_miss)


def model_state(model: nn.Module) -> dict[str, Any]:
    """The weights that a checkpoint holds: all but frozen ones that come from a file of their own (a ViT-g, a language model)."""
    left_out = unsaved_parts(model)
    return {name: value for name, value in model.state_dict().items() if not (left_out and name.startswith(left_out))}


def unsaved_parts(model: Any) -> tuple[str, ...]:
    """Beginnings of the names that a checkpoint leaves out: our models say it; of LAVIS's BLIP-2 what it has frozen."""
    if hasattr(model, "unsaved_parts"):
        return model.unsaved_parts()
    parts = ("visual_encoder", "opt_model", "t5_model") if isinstance(model, Blip2Base) else ()
    frozen = (part for part in parts if hasattr(model, part) and not any(p.requires_grad for p in getattr(model, part).parameters()))
    return tuple(f"{part}." for part in frozen)


def random_state(device: torch.device) -> dict[str, Any]:
    """All generators as tensors and numbers, so that reading them back runs no code."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # the legacy tuple
    state: dict[str, Any] = {
        "python": {"version": version, "numbers": torch.tensor(numbers), "gauss": gauss},
        "numpy": {"name": name, "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)), "rest": [position, has_gauss, cached]},
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["numbers"].tolist()), python["gauss"]))
    np.random.set_state((numpy["name"], numpy["keys"].numpy().astype(np.uint32), *numpy["rest"]))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
