"""One optimisation step: autocast, backward, accumulation, clipping, loss scaling."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lavis_mafa.common.settings import RunBlock
from lavis_mafa.tasks.mafa_task import MafaTask

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> Any:
    """The context that ``run.precision`` asks for; nothing at all for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=PRECISIONS[precision])


class Stepper:
    """Forward and backward on each batch, and the optimizer's step at the end of each accumulation window."""

    def __init__(
        self,
        task: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        settings: RunBlock,
        device: torch.device,
    ) -> None:
        self.task, self.model, self.optimizer, self.scaler = task, model, optimizer, scaler
        self.settings, self.device = settings, device

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
        if last:
            self._update()
        return output

    def _update(self) -> None:
        if self.settings.grad_clip is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _without_sync(self) -> Any:
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else contextlib.nullcontext()
