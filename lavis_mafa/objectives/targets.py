"""Soft targets of the contrastive loss: known positives, mined positives, smoothing (MAFA sections 4.1, 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def itc_targets(
    known_positive: Tensor,
    new_positive: Tensor,
    new_positive_mask: Tensor,
    smoothing: float = 0.0,
    excluded: Tensor | None = None,
) -> Tensor:
    """Target rows of ITC with ECM and S-ITC.

    A row shares its mass equally between its known positives and, where Con-D found one, the new positive: with one of each,
    one half each (MAFA section 4.1). It is then smoothed (eq. 5): ``(1 - smoothing) * y + smoothing / K``.

    Args:
        known_positive: BoolTensor[B, K], at least the own pair of each row.
        new_positive: LongTensor[B], column of the mined candidate; any value where the mask is False.
        new_positive_mask: BoolTensor[B], True where the candidate became a positive.
        smoothing: alpha of eq. 5, in [0, 1]; 0 is off.
        excluded: BoolTensor[B, K], pairs that take no part (ECM-E: eliminated false negatives); smoothing spreads over the
            others.

    Returns:
        Tensor[B, K] in fp32, rows sum to 1.

    Raises:
        ValueError: ``smoothing`` outside [0, 1] or shapes that do not fit.

    Example:
        >>> itc_targets(torch.eye(2, dtype=torch.bool), torch.tensor([1, 0]), torch.tensor([True, False]))
        tensor([[0.5000, 0.5000],
                [0.0000, 1.0000]])
    """
    rows, _ = known_positive.shape
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"smoothing is {smoothing}, but must be in [0, 1]")
    if new_positive.shape != (rows,) or new_positive_mask.shape != (rows,):
        raise ValueError(f"new_positive and its mask must be [{rows}], not {list(new_positive.shape)}")
    labels = known_positive.float()
    column = new_positive.clamp_min(0)[:, None]
    found = torch.maximum(labels.gather(1, column), new_positive_mask.float()[:, None])
    labels = labels.scatter(1, column, found)
    targets = labels / labels.sum(dim=1, keepdim=True)
    if smoothing == 0.0:
        return targets
    share = torch.ones_like(targets) if excluded is None else (~excluded).float()
    return (1.0 - smoothing) * targets + smoothing * share / share.sum(dim=1, keepdim=True)
