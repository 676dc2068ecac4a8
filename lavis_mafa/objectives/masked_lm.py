"""Masked language modelling at any probability (ALBEF eq. 3, GRIT-VLP 4.2), with momentum distillation (ALBEF eq. 7)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


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
