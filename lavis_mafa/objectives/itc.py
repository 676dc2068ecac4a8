"""Image-text contrastive loss with soft targets (MAFA eq. 1 and 5), and GRIT-VLP's consistency loss (eq. 6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def itc_targets(
    known_positive: Tensor,
    new_positive: Tensor | None = None,
    new_positive_mask: Tensor | None = None,
    smoothing: float = 0.0,
    excluded: Tensor | None = None,
) -> Tensor:
    """Target rows of ITC with ECM and S-ITC.

    A row shares its mass equally between its known positives and, where Con-D found one, the new positive: with one of each,
    one half each (MAFA section 4.1). It is then smoothed (eq. 5): ``(1 - smoothing) * y + smoothing / K``.

    Args:
        known_positive: BoolTensor[B, K], at least the own pair of each row.
        new_positive: LongTensor[B], column of the mined candidate; any value where the mask is False. None: nothing was found.
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
    labels = known_positive.float()
    if new_positive is not None and new_positive_mask is not None:
        if new_positive.shape != (rows,) or new_positive_mask.shape != (rows,):
            raise ValueError(f"new_positive and its mask must be [{rows}], not {list(new_positive.shape)}")
        column = new_positive.clamp_min(0)[:, None]
        found = torch.maximum(labels.gather(1, column), new_positive_mask.float()[:, None])
        labels = labels.scatter(1, column, found)
    targets = labels / labels.sum(dim=1, keepdim=True)
    if smoothing == 0.0:
        return targets
    share = torch.ones_like(targets) if excluded is None else (~excluded).float()
    return (1.0 - smoothing) * targets + smoothing * share / share.sum(dim=1, keepdim=True)


def itc_loss(logits_i2t: Tensor, logits_t2i: Tensor, targets_i2t: Tensor, targets_t2i: Tensor, focal: float = 0.0) -> Tensor:
    """Mean of the two directions' cross-entropies with soft targets (MAFA eq. 1; eq. 5 when the targets are smoothed).

    With ``focal`` g > 0, ``-sum_j y_j (1 - p_j)^g log p_j``: what is told well already counts less (SoftMask; arXiv 1708.02002).

    Computed in fp32. A logit of -inf is a pair that takes no part; its target must be 0. A NaN logit or target gives a NaN loss.

    Args:
        logits_i2t: [B, K] similarity / temperature of image b and text k.
        logits_t2i: [B, K] the same for text b and image k.
        targets_i2t: [B, K], rows sum to 1; so for ``targets_t2i``.
        focal: g, 0 or more.

    Returns:
        Tensor[].

    Example:
        >>> itc_loss(torch.zeros(2, 2), torch.zeros(2, 2), torch.eye(2), torch.eye(2))  # nothing is told apart: log 2
        tensor(0.6931)
    """
    return (_soft_cross_entropy(logits_i2t, targets_i2t, focal) + _soft_cross_entropy(logits_t2i, targets_t2i, focal)) / 2


def consistency_loss(logits_i2t: Tensor, logits_t2i: Tensor) -> Tensor:
    """How far the two directions disagree (GRIT-VLP eq. 6, without its weight lambda).

    ``1/2 mean_b [ KL(sg p_i2t(b) || p_t2i(b)) + KL(sg p_t2i(b) || p_i2t(b)) ]``, where sg stops the gradient.

    Logits [B, K] of both directions -> Tensor[], 0 where both agree.
    """
    log_i2t = F.log_softmax(logits_i2t.float(), dim=1)
    log_t2i = F.log_softmax(logits_t2i.float(), dim=1)
    kl_t2i = F.kl_div(log_t2i, log_i2t.detach(), log_target=True, reduction="batchmean")
    kl_i2t = F.kl_div(log_i2t, log_t2i.detach(), log_target=True, reduction="batchmean")
    return (kl_i2t + kl_t2i) / 2


def _soft_cross_entropy(logits: Tensor, targets: Tensor, focal: float) -> Tensor:
    log_probability = F.log_softmax(logits.float(), dim=1)
    if focal > 0:
        # of 0 a power below 1 has no finite gradient
        unsure = (-torch.expm1(log_probability)).clamp_min(torch.finfo(log_probability.dtype).tiny)
        targets = targets * unsure**focal
    # 0 * -inf is NaN: a pair without target mass must not enter the sum; a NaN target (its teacher diverged) must
    terms = torch.where(targets != 0, targets * log_probability, torch.zeros_like(targets))
    return -terms.sum(dim=1).mean()
