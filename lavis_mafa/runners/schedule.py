"""Learning rate: linear warm-up, then a cosine, both per step (ALBEF section 3.5)."""

from __future__ import annotations

import math
from typing import Any

import torch


class WarmupCosinePerStep:
    """LAVIS's scheduler interface with a cosine that moves every step and may be longer than the training.

    The authors stop a 30-epoch cosine after 20 epochs; ``lr_horizon_epochs: 30`` with ``max_epoch: 20`` does the same. Warm-up may
    be longer than an epoch; it is part of the horizon, and the cosine starts where it ends.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        max_epoch: int,
        min_lr: float,
        init_lr: float,
        warmup_steps: int = 0,
        warmup_start_lr: float = -1,
        steps_per_epoch: int | None = None,
        **_: Any,
    ) -> None:
        if steps_per_epoch is None:
            raise ValueError("lr_sched warmup_cosine_per_step needs run.runner: runner_mafa, which knows the steps per epoch")
        self.optimizer, self.min_lr, self.init_lr, self.warmup_steps = optimizer, min_lr, init_lr, warmup_steps
        self.warmup_start_lr = warmup_start_lr if warmup_start_lr >= 0 else init_lr
        self.steps_per_epoch = steps_per_epoch
        self.horizon = max(max_epoch * steps_per_epoch, 1)

    def at(self, step: int) -> float:
        """The learning rate of global step ``step``."""
        if step < self.warmup_steps:
            return self.warmup_start_lr + (self.init_lr - self.warmup_start_lr) * step / self.warmup_steps
        done = min((step - self.warmup_steps) / max(self.horizon - self.warmup_steps, 1), 1.0)
        return self.min_lr + (self.init_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * done))

    def step(self, cur_epoch: int, cur_step: int) -> None:
        rate = self.at(cur_epoch * self.steps_per_epoch + cur_step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
