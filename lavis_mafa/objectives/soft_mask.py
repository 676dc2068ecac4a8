"""Text-driven soft masks: where a word looks, and half of an image's patches masked by that (SoftMask, arXiv 2304.00719)."""

from __future__ import annotations

import torch
from torch import Tensor

FAINT = 1e-6  # of a map's greatest value: what every patch has at least


def word_cam(attention: Tensor, gradient: Tensor) -> Tensor:
    """Where a word looks for what a score rises with (Grad-CAM of a cross-attention, ALBEF section 6).

    ``mean_heads( relu(d score / d attention) * attention )``.

    Args:
        attention: [..., heads, T, N] probabilities of T words over N patches. gradient: the score's, of the same shape.

    Returns:
        [..., T, N] in fp32, nowhere negative.

    Example:
        >>> word_cam(torch.full((2, 1, 3), 0.5), torch.tensor([[[1.0, -1.0, 0.0]], [[3.0, 0.0, 0.0]]]))
        tensor([[1., 0., 0.]])
    """
    return (gradient.float().relu() * attention.float()).mean(dim=-3)


def soft_mask(cam: Tensor, share: float = 0.5) -> Tensor:
    """How much of each patch a map takes away: ``min(1, c * cam)``, c such that the mean is ``share`` (SoftMask, supplement section 2).

    Where a map is 0 everywhere, or on too many patches, these are all masked alike.

    Args:
        cam: [..., N], nowhere negative.
        share: of the N patches, which the mask's values add up to; in (0, 1).

    Returns:
        [..., N] in [0, 1], fp32.

    Raises:
        ValueError: ``share`` is outside (0, 1).

    Example:
        >>> soft_mask(torch.tensor([6.0, 1.0, 1.0, 0.0])).round(decimals=2)  # the first is full, the others share what is left
        tensor([1.0000, 0.5000, 0.5000, 0.0000])
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share is {share}, but must be in (0, 1)")
    cam = cam.float()
    greatest = cam.amax(dim=-1, keepdim=True)
    cam = cam / greatest.masked_fill(greatest == 0, 1.0) + FAINT
    rest = cam.sort(dim=-1).values.cumsum(dim=-1).flip(-1)  # of all patches but the j greatest, j = 0, 1, ...
    full = torch.arange(rest.shape[-1], device=rest.device)
    # with c, j + c * rest is no less than the mask's sum for any j, and equal for the j that are full: so c is the greatest of all
    scale = ((share * rest.shape[-1] - full) / rest).amax(dim=-1, keepdim=True)
    return (scale * cam).clamp(max=1.0)
