"""Autoregressive language modelling, as BLIP and BLIP-2 train it (BLIP section 3.2; BLIP-2 section 3.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LABEL_SMOOTHING = 0.1  # of BLIP and BLIP-2


def language_modelling_loss(
    states: Tensor, input_ids: Tensor, head: Callable[[Tensor], Tensor], pad_token_id: int, label_smoothing: float = LABEL_SMOOTHING
) -> Tensor:
    """Mean cross-entropy of each token given those before it; padding is not predicted.

    The head runs only where there is a token to predict: its logits are the largest tensor of the step, and much of it is padding.

    Args:
        states: [P, T, width]; state t has seen tokens 0 to t.
        input_ids: LongTensor[P, T], padded at the end.
        head: [N, width] -> [N, V].
        pad_token_id: of padding.
        label_smoothing: the share of the target that is spread over the vocabulary.

    Returns:
        Tensor[]; where no token follows another it is 0 and still has a graph, so that every rank runs the same backward pass.

    Example:
        >>> head = torch.nn.Linear(4, 10)
        >>> language_modelling_loss(torch.zeros(1, 3, 4), torch.tensor([[1, 5, 0]]), head, pad_token_id=0).shape
        torch.Size([])
    """
    next_token = input_ids[:, 1:].flatten()
    there = torch.nonzero(next_token != pad_token_id).flatten()
    logits = head(states[:, :-1].flatten(0, 1).index_select(0, there))
    reduction = "mean" if len(there) else "sum"  # a mean of nothing is NaN
    return F.cross_entropy(logits.float(), next_token[there], label_smoothing=label_smoothing, reduction=reduction)
