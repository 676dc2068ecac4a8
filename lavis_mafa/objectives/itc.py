"""Image-text contrastive loss (MAFA eq. 1 and 5) and GRIT-VLP's consistency loss (eq. 6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def itc_loss(logits_i2t: Tensor, logits_t2i: Tensor, targets_i2t: Tensor, targets_t2i: Tensor) -> Tensor:
    """Mean of the two directions' cross-entropies with soft targets (MAFA eq. 1; eq. 5 when the targets are smoothed).

    Computed in fp32. A logit of -inf is a pair that takes no part; its target must be 0. A NaN logit or target gives a NaN loss.

    Args:
        logits_i2t: [B, K] similarity / temperature of image b and text k.
        logits_t2i: [B, K] the same for text b and image k.
        targets_i2t: [B, K], rows sum to 1.
        targets_t2i: [B, K], rows sum to 1.

    Returns:
        Tensor[].

    Example:
        >>> logits = torch.eye(2) * 100.0
        >>> float(itc_loss(logits, logits, torch.eye(2), torch.eye(2)))
        0.0
    """
    return (_soft_cross_entropy(logits_i2t, targets_i2t) + _soft_cross_entropy(logits_t2i, targets_t2i)) / 2


def consistency_loss(logits_i2t: Tensor, logits_t2i: Tensor) -> Tensor:
    """How far the two directions disagree (GRIT-VLP eq. 6, without its weight lambda).

    ``1/2 mean_b [ KL(sg p_i2t(b) || p_t2i(b)) + KL(sg p_t2i(b) || p_i2t(b)) ]``, where sg stops the gradient.

    Args:
        logits_i2t: [B, K].
        logits_t2i: [B, K].

    Returns:
        Tensor[], 0 where both agree.
    """
    log_i2t = F.log_softmax(logits_i2t.float(), dim=1)
    log_t2i = F.log_softmax(logits_t2i.float(), dim=1)
    kl_t2i = F.kl_div(log_t2i, log_i2t.detach(), log_target=True, reduction="batchmean")
    kl_i2t = F.kl_div(log_i2t, log_t2i.detach(), log_target=True, reduction="batchmean")
    return (kl_i2t + kl_t2i) / 2


def _soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    log_probability = F.log_softmax(logits.float(), dim=1)
    # 0 * -inf is NaN: a pair without target mass must not enter the sum; a NaN target (its teacher diverged) must
    terms = torch.where(targets != 0, targets * log_probability, torch.zeros_like(targets))
    return -terms.sum(dim=1).mean()
