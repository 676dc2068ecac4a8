"""Image-text matching: which pairs are shown to the matching head, with which labels (ALBEF eq. 4; MAFA eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_mafa.objectives.connections import Connections
from lavis_mafa.objectives.mining import HardNegatives


@dataclass(frozen=True)
class CandidatePairs:
    """The 2B pairs Con-D is asked about: (image b, its hardest text), then (hardest image of text b, text b)."""

    image_index: Tensor  # LongTensor[2B]
    text_index: Tensor  # LongTensor[2B]
    exists: Tensor  # BoolTensor[2B], False where an anchor has no candidate (its own pair stands in)


@dataclass(frozen=True)
class ItmPairs:
    """The 3B pairs of the matching loss; weight 0 marks a pair that takes no part (shapes stay static)."""

    image_index: Tensor  # LongTensor[3B]
    text_index: Tensor  # LongTensor[3B]
    label: Tensor  # LongTensor[3B], 1 matches
    weight: Tensor  # Tensor[3B], 0 or 1


def candidate_pairs(negatives: HardNegatives, second: bool = False) -> CandidatePairs:
    """Write the mined candidates (or the second hardest) of both directions as one list of pairs."""
    texts = negatives.text_for_image_2nd if second else negatives.text_for_image
    images = negatives.image_for_text_2nd if second else negatives.image_for_text
    own = torch.arange(len(texts), device=texts.device)
    exists = torch.cat([texts, images]) >= 0
    return CandidatePairs(
        image_index=torch.cat([own, torch.where(images >= 0, images, own)]),
        text_index=torch.cat([torch.where(texts >= 0, texts, own), own]),
        exists=exists,
    )


def itm_pairs(
    negatives: HardNegatives,
    connections: Connections | None = None,
    false_negatives: str = "convert",
    resample_ambiguous: bool = True,
) -> ItmPairs:
    """The pairs of the matching loss: B own pairs, then the 2B hard negatives with labels corrected by ECM.

    A candidate that Con-D calls positive is kept with label 1 (``convert``) or left out (``eliminate``, ECM-E of Table 5). An
    ambiguous one is replaced by the anchor's second hardest candidate (MAFA section 4.1), or left out when there is none.

    Args:
        negatives: what was mined.
        connections: verdicts on the 2B pairs of ``candidate_pairs(negatives)``; None trusts all of them as negatives.
        false_negatives: convert | eliminate.
        resample_ambiguous: False keeps an ambiguous candidate as a negative.
    """
    first, second = candidate_pairs(negatives), candidate_pairs(negatives, second=True)
    image_index, text_index, keep = first.image_index, first.text_index, first.exists
    label = torch.zeros_like(image_index)
    if connections is not None:
        positive = connections.positive
        if resample_ambiguous:
            swap = connections.ambiguous
            image_index = torch.where(swap, second.image_index, image_index)
            text_index = torch.where(swap, second.text_index, text_index)
            keep = torch.where(swap, second.exists, keep)
        if false_negatives == "eliminate":
            keep = keep & ~positive
        else:
            label = positive.long()
    own = torch.arange(len(negatives.text_for_image), device=image_index.device)
    return ItmPairs(
        image_index=torch.cat([own, image_index]),
        text_index=torch.cat([own, text_index]),
        label=torch.cat([torch.ones_like(own), label]),
        weight=torch.cat([torch.ones_like(own), keep.long()]).float(),
    )


def itm_loss(logits: Tensor, pairs: ItmPairs) -> Tensor:
    """Cross-entropy of the matching head, averaged over the pairs that remain (MAFA eq. 3): [3B, 2], column 1 "matches" -> []."""
    per_pair = F.cross_entropy(logits.float(), pairs.label, reduction="none")
    return (per_pair * pairs.weight).sum() / pairs.weight.sum()


def itm_accuracy(logits: Tensor, pairs: ItmPairs) -> tuple[Tensor, Tensor]:
    """Share of right answers on pairs labelled positive and on pairs labelled negative (NaN where there is none)."""
    right = (logits.argmax(dim=1) == pairs.label).float() * pairs.weight
    positive = pairs.label.float() * pairs.weight
    negative = (1 - pairs.label).float() * pairs.weight
    return (right * positive).sum() / positive.sum(), (right * negative).sum() / negative.sum()
