"""Contrast within images and within texts, and of a whole with its parts (TCL, arXiv 2202.10401; GRIT-VLP Table 6).

The anchor is the model's feature of one view, its keys are the momentum encoder's of another: a second augmentation of the image, or
the text read once more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_mafa.objectives.itc import itc_loss


@dataclass(frozen=True)
class IntraModal:
    """Cosines of B anchors with their own modality, images first, in fp32. None is off."""

    whole: tuple[Tensor, Tensor] | None = None  # [B, C] image b and image key c; text b and text key c
    # [B, K, M] image b and part m of image k; [B, K, N] text b and token n of text k; BoolTensor[K, N], False where text k has ended
    parts: tuple[Tensor, Tensor, Tensor] | None = None


def intra_modal_losses(intra: IntraModal, temperature: Tensor, known_positive: Tensor) -> dict[str, Tensor]:
    """The mean over images and texts of each loss that is on: ``loss_imc`` of wholes, ``loss_lmi`` of parts (Tensor[] each).

    Args:
        known_positive: BoolTensor[B, C], the own keys among them. What is known to match shares an anchor's target equally, and its
            parts are not the anchor's negatives; with the own pairs alone this is TCL's own loss.
    """
    losses = {}
    if intra.whole is not None:
        targets = known_positive / known_positive.sum(dim=1, keepdim=True)
        images, texts = intra.whole
        losses["loss_imc"] = itc_loss(images / temperature, texts / temperature, targets, targets)
    if intra.parts is not None:
        patches, words, real = intra.parts
        known = known_positive[:, : patches.shape[1]]
        of_images, of_texts = local_loss(patches / temperature, known), local_loss(words / temperature, known, real)
        losses["loss_lmi"] = (of_images + of_texts) / 2
    return losses


def local_loss(logits: Tensor, known_positive: Tensor, real: Tensor | None = None) -> Tensor:
    """Each anchor picks each of its own parts out of the parts of all others (local mutual information, TCL section 3.2).

    ``-mean_b mean_m log( e^{s_bbm} / (e^{s_bbm} + sum_{k, n} e^{s_bkn}) )``, k over the candidates that anchor b is not known to match.

    Args:
        logits: [B, K, M] similarity / temperature of anchor b and part m of candidate k; the first B candidates are the anchors' own.
        known_positive: BoolTensor[B, K], the own among them.
        real: BoolTensor[K, M], False where a candidate has no such part; each anchor has at least one. None: all have all.

    Returns:
        Tensor[] in fp32; 0 where no anchor has a negative.

    Example:
        >>> logits = torch.zeros(2, 2, 3)  # nothing is told apart: one of four, its own part and the three of the other
        >>> local_loss(logits, torch.eye(2, dtype=torch.bool))
        tensor(1.3863)
    """
    logits, rows = logits.float(), len(logits)
    real = torch.ones_like(logits[0], dtype=torch.bool) if real is None else real
    taken = ~known_positive[:, :, None] & real
    # finite: the gradient of logsumexp over nothing but -inf is NaN
    others = torch.logsumexp(logits.masked_fill(~taken, torch.finfo(logits.dtype).min).flatten(1), dim=1)
    own = logits[:, :rows].diagonal(dim1=0, dim2=1).T  # [B, M]
    terms, counted = F.softplus(others[:, None] - own), real[:rows].float()
    return ((terms * counted).sum(dim=1) / counted.sum(dim=1)).mean()


def pooled_patches(features: Tensor) -> Tensor:
    """A square of s x s patches averaged to n x n regions, n = floor(sqrt(s)): [B, s*s, d] -> [B, n*n, d]; 16 x 16 make 4 x 4.

    Where n does not divide s regions overlap, so that every image size will do. ValueError where the patches make no square.

    Example:
        >>> pooled_patches(torch.randn(2, 256, 8)).shape
        torch.Size([2, 16, 8])
    """
    side = math.isqrt(features.shape[1])
    if side**2 != features.shape[1]:
        raise ValueError(f"{features.shape[1]} patches make no square")
    grid = features.transpose(1, 2).reshape(len(features), features.shape[2], side, side)
    return F.adaptive_avg_pool2d(grid, math.isqrt(side)).flatten(2).transpose(1, 2)
