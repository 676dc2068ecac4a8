"""Masked language modelling (ALBEF eq. 3 and 7), and autoregressive as BLIP and BLIP-2 train it (BLIP section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # no token is to be predicted here
LABEL_SMOOTHING = 0.1  # of BLIP and BLIP-2


def mask_tokens(
    input_ids: Tensor, probability: float, mask_token_id: int, vocab_size: int, special_token_ids: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Mask tokens as BERT does: of those chosen, 80 % become [MASK], 10 % a random token, 10 % stay.

    Args:
        input_ids: LongTensor[P, T].
        probability: with which each ordinary token is chosen, in [0, 1].
        mask_token_id: id of [MASK].
        vocab_size: random tokens are drawn from [0, vocab_size).
        special_token_ids: never chosen ([CLS], [SEP], padding).

    Returns:
        masked ids LongTensor[P, T]; labels LongTensor[P, T], -100 where nothing is to be predicted.
    """
    special = torch.zeros_like(input_ids, dtype=torch.bool)
    for token in special_token_ids:
        special = special | (input_ids == token)
    draw = torch.rand(input_ids.shape, device=input_ids.device)
    chosen = (draw < probability) & ~special
    what = torch.rand(input_ids.shape, device=input_ids.device)
    noise = torch.randint(vocab_size, input_ids.shape, device=input_ids.device)
    masked = torch.where(chosen & (what < 0.8), mask_token_id, input_ids)
    masked = torch.where(chosen & (what >= 0.9), noise, masked)
    return masked, torch.where(chosen, input_ids, IGNORED)


def masked_lm_loss(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, alpha: float = 0.0) -> Tensor:
    """Mean cross-entropy over masked tokens, mixed with the momentum teacher's prediction (ALBEF eq. 7).

    Without a masked token the loss is 0 and still has a graph, so that every rank runs the same backward pass.

    Args:
        logits: [N, V] of the masked positions alone.
        labels: LongTensor[N] their tokens.
        teacher_logits: [N, V] of the momentum model, or None.
        alpha: weight of the teacher's distribution.

    Returns:
        Tensor[].
    """
    count = max(len(labels), 1)
    logits = logits.float()
    loss = F.cross_entropy(logits, labels, reduction="sum") / count
    if teacher_logits is None or alpha == 0.0:
        return loss
    soft = F.softmax(teacher_logits.float(), dim=1)
    distilled = -(soft * F.log_softmax(logits, dim=1)).sum() / count
    return (1 - alpha) * loss + alpha * distilled


def language_modelling_loss(
    states: Tensor, next_token: Tensor, head: Callable[[Tensor], Tensor], label_smoothing: float = LABEL_SMOOTHING
) -> Tensor:
    """Mean cross-entropy of each token given those before it.

    The head's logits are the largest tensor of the step: it runs only where there is a token to predict.

    Args:
        states: [N, width] of the tokens that another follows; one has seen its text up to itself.
        next_token: LongTensor[N], those that follow.
        head: [N, width] -> [N, V], which is overwritten where it has a gradient.
        label_smoothing: the share of the target that is spread over the vocabulary.

    Returns:
        Tensor[]; where no token follows another it is 0 and still has a graph, so that every rank runs the same backward pass.

    Example:
        >>> head = torch.nn.Linear(4, 10)
        >>> language_modelling_loss(torch.zeros(2, 4), torch.tensor([5, 1]), head).shape
        torch.Size([])
    """
    loss: Tensor = _CrossEntropy.apply(head(states).float(), next_token, label_smoothing)
    return loss


class _CrossEntropy(torch.autograd.Function):
    """``F.cross_entropy`` in place, which makes five tensors of the logits' size more: the gradient takes the logits' place.

    A second backward pass of the same graph is refused.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
        trains, target = ctx.needs_input_grad[0], target[:, None]
        log_p = torch.log_softmax(logits, 1, out=logits if trains else None)
        of_target = log_p.gather(1, target)
        losses = (smoothing - 1) * of_target - smoothing * log_p.mean(dim=1, keepdim=True)
        if trains:
            gradient = log_p.exp_().sub_(smoothing / logits.shape[1])
            ctx.save_for_backward(gradient.scatter_add_(1, target, torch.full_like(of_target, smoothing - 1)))
        return losses.sum() / max(1, len(losses))  # a mean of nothing is NaN

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(weight / max(1, len(gradient))), None, None
