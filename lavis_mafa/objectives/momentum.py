"""ALBEF's momentum distillation (section 3.3): a moving-average teacher, its soft targets and its queue of features."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def update_teacher(student: Iterable[Tensor], teacher: Iterable[Tensor], momentum: float) -> None:
    """Move the teacher's parameters towards the student's: ``teacher = momentum * teacher + (1 - momentum) * student``."""
    for source, target in zip(student, teacher, strict=True):
        target.mul_(momentum).add_(source.to(target.dtype), alpha=1 - momentum)


def distilled_targets(targets: Tensor, teacher_logits: Tensor, alpha: float) -> Tensor:
    """``(1 - alpha) * targets + alpha * softmax(teacher_logits)`` (ALBEF eq. 6 as soft targets), all [B, K]."""
    return (1 - alpha) * targets + alpha * F.softmax(teacher_logits.float(), dim=1)


def ramp_up(alpha: float, epoch: int, step: int, steps_per_epoch: int) -> float:
    """The distillation weight rises linearly from 0 to ``alpha`` within the first epoch (ALBEF section 3.5)."""
    return alpha * min(1.0, (epoch * steps_per_epoch + step) / max(steps_per_epoch, 1))


@torch.no_grad()
def enqueue(queue: Tensor, position: Tensor, features: Tensor, taken: Tensor | None = None) -> None:
    """Write a batch over the oldest columns of a ring buffer, in place; a batch may run over the end.

    Args:
        queue: [d, Q] (or [Q]) the ring buffer.
        position: LongTensor[1], where the next column goes; not moved here, since queues share it.
        features: [B, d] (or [B]), B <= Q.
        taken: BoolTensor[B], False where a column keeps its old content (features that are not finite must never get in);
            default: all are taken.
    """
    size = queue.shape[-1]
    columns = (position + torch.arange(len(features), device=queue.device)) % size
    new = features.T.to(queue.dtype) if features.dim() == 2 else features
    queue[..., columns] = new if taken is None else torch.where(taken, new, queue[..., columns])
