"""One optimisation step: autocast, backward, accumulation, clipping, loss scaling; not applied when it is not finite."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lavis_mafa.config.schema import RunBlock
from lavis_mafa.tasks.task import MafaTask

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> Any:
    """The context that ``run.precision`` asks for; nothing at all for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=PRECISIONS[precision])


class Stepper:
    """Forward and backward on each batch, and the optimizer's step at the end of each accumulation window.

    Args:
        vote: asked once a window with "this rank's loss or gradient is not finite"; True when any rank's is not.

    Attributes:
        applied: whether the last window changed the weights, or None inside a window. A loss scaler that skips a step to find
            its scale did what it should: that counts as applied.
        gradient_norm: of the window that just ended, before clipping, or None inside a window.
    """

    def __init__(
        self,
        task: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        settings: RunBlock,
        device: torch.device,
        vote: Callable[[bool], bool] = bool,
    ) -> None:
        self.task, self.model, self.optimizer, self.scaler = task, model, optimizer, scaler
        self.settings, self.device, self.vote = settings, device, vote
        self.applied: bool | None = None
        self.gradient_norm: Tensor | None = None
        self._bad_loss = torch.zeros((), dtype=torch.bool, device=device)

    def __call__(self, samples: dict[str, Any], step: int, steps_per_epoch: int) -> dict[str, Any]:
        """Train on one batch; returns the model's output, or the loss alone for LAVIS's tasks."""
        window = self.settings.accum_grad_iters
        first = step - step % window
        length = min(window, steps_per_epoch - first)  # the epoch's last window may be short
        last = step == first + length - 1
        with self._without_sync() if not last else contextlib.nullcontext():
            with autocast(self.settings.precision, self.device):
                if isinstance(self.task, MafaTask):
                    output = self.task.step_output(model=self.model, samples=samples)
                else:
                    output = {"loss": self.task.train_step(model=self.model, samples=samples)}
            loss = output["loss"] / length
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self._bad_loss |= ~torch.isfinite(loss.detach())
        self.gradient_norm = None
        self.applied = self._update() if last else None
        return output

    def _update(self) -> bool:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        limit = float("inf") if self.settings.grad_clip is None else self.settings.grad_clip
        self.gradient_norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit).detach()
        bad = self._bad_loss
        if self.scaler is None or self.scaler.get_scale() <= 1.0:  # else a gradient beyond fp16 is the scaler's to mend
            bad = bad | ~torch.isfinite(self.gradient_norm)
        bad_anywhere = self.vote(bool(bad))  # the one place where the host waits for the step
        if self.scaler is None:
            if not bad_anywhere:
                self.optimizer.step()
        else:
            if not bad_anywhere:
                self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._bad_loss = torch.zeros_like(self._bad_loss)
        return not bad_anywhere

    def _without_sync(self) -> Any:
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else contextlib.nullcontext()
