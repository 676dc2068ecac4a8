"""A run's files on disk: whole checkpoints that resume, kept in bounded number, with one state file a rank beside each."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lavis.models.blip2_models.blip2 import Blip2Base
from torch import nn

from lavis_mafa.errors import UserError
from lavis_mafa.runners.background import BackgroundWriter, host_copy
from lavis_mafa.weights import load_exactly, read_checkpoint, write_atomically

logger = logging.getLogger(__name__)
RankState = Callable[[], dict[str, Any]]


class CheckpointFolder:
    """Writes ``checkpoint_NAME.pth`` (LAVIS's layout) and ``checkpoint_NAME.rankR.pth`` (queue, order, random states).

    Args:
        folder: the run's output directory.
        keep: how many of the numbered checkpoints stay; the best one always does.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder, self.keep = folder, keep
        self.written = [path.stem.removeprefix("checkpoint_") for path in reversed(numbered(folder))]  # of a run that goes on
        self._writer = BackgroundWriter()

    @property
    def failed(self) -> bool:
        """Whether the last one could not be written; :meth:`wait` raises what was in the way."""
        return self._writer.failed

    def path(self, name: str) -> Path:
        return self.folder / f"checkpoint_{name}.pth"

    def save(self, name: str, content: dict[str, Any] | None, rank_state: RankState | None, rank: int) -> None:
        """Copy ``content`` to the host and write it while the training goes on; every rank must call it.

        Args:
            name: of the file, e.g. ``3`` after epoch 3 or ``3_120``.
            content: of ``checkpoint_NAME.pth``, on rank 0 alone.
            rank_state: gives what goes into ``checkpoint_NAME.rankR.pth``; called by the thread that writes.
            rank: of this process.

        Raises:
            UserError: the one before could not be written.
        """
        self._writer.wait()
        content = host_copy(content)
        self._writer.start(lambda: self._write(name, content, rank_state, rank))

    def wait(self) -> None:
        """Until the last one is complete.

        Raises:
            UserError: it could not be written.
        """
        self._writer.wait()

    def last_chance(self) -> None:
        """Let the last one come to its end although the run has failed."""
        self._writer.join()

    def _write(self, name: str, content: dict[str, Any] | None, rank_state: RankState | None, rank: int) -> None:
        """Each rank's state first, then from rank 0 (the one with ``content``) the weights: their file is the sign that all of the
        checkpoint is there. Nothing older goes before."""
        path = self.path(name)
        if rank_state is not None:
            self._writer.agree(lambda: write_atomically(rank_state(), rank_file(path, rank)))
        self._writer.agree(lambda: _write_weights(content, path))
        if name == "best":
            return
        self.written = [*(n for n in self.written if n != name), name]
        old, self.written = self.written[: -self.keep], self.written[-self.keep :]
        try:
            for path in map(self.path, old):
                if content is not None:
                    path.unlink(missing_ok=True)  # first, so that no weights stand without their states
                rank_file(path, rank).unlink(missing_ok=True)
        except OSError as error:  # it takes room, but nothing is lost
            logger.warning("an old checkpoint cannot be removed: %s", error)


def _write_weights(content: dict[str, Any] | None, path: Path) -> None:
    if content is None:
        return
    bad = [name for name, value in content["model"].items() if value.is_floating_point() and bool(value.isnan().any())]
    if bad:
        raise UserError(f"{path} is not written: {len(bad)} of the model's weights hold NaN, the first {bad[0]}.")
    write_atomically(content, path)


def rank_file(checkpoint: Path, rank: int) -> Path:
    return checkpoint.with_name(f"{checkpoint.stem}.rank{rank}.pth")


def numbered(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest first; without the best one, which does not resume."""
    files = [path for path in folder.glob("checkpoint_*.pth") if re.fullmatch(r"checkpoint_\d+(_\d+)?\.pth", path.name)]
    return sorted(files, key=position, reverse=True)


def position(checkpoint: Path) -> tuple[int, int]:
    """The epoch and the step that come next: ``checkpoint_4.pth`` ends epoch 4, ``checkpoint_4_37.pth`` is in the middle of it.

    Example:
        >>> position(Path("checkpoint_4.pth")), position(Path("checkpoint_4_37.pth"))
        ((5, 0), (4, 37))
    """
    epoch, *step = map(int, checkpoint.stem.split("_")[1:])
    return (epoch, step[0]) if step else (epoch + 1, 0)


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
    # what the texts in a teacher's queue are is not known to checkpoints from before this was kept
    load_exactly(model, state, f"run.resume_ckpt_path: {source}", may_miss=(*may_miss, "text_queue_keys"))


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
