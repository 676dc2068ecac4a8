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
class ExtraPairs:
    """E pairs with images or texts beyond the batch, such as a text with one word replaced; the matching loss alone sees them.

    They are no candidates: not mined, not contrasted, in no language model, in no queue and no record of verdicts.
    """

    image_index: Tensor  # LongTensor[E]; from K on rows beyond the K candidates, likewise of texts
    text_index: Tensor  # LongTensor[E]
    label: Tensor  # LongTensor[E], 1 matches
    weight: Tensor  # Tensor[E], 0 or 1
    texts: list[str] | None = None  # what text rows K, K + 1, ... say: Con-D is asked about these pairs; None: it is not
    in_place: bool = False  # pair b (of B) is image b's, and takes the place of that image's hardest text


@dataclass(frozen=True)
class ItmPairs:
    """The P = 3B pairs of the matching loss, and extra ones; weight 0 marks a pair that takes no part (shapes stay static)."""

    image_index: Tensor  # LongTensor[P]
    text_index: Tensor  # LongTensor[P]
    label: Tensor  # LongTensor[P], 1 matches
    weight: Tensor  # Tensor[P], 0 or 1
    extra: Tensor | None = None  # BoolTensor[P]: is it one of ExtraPairs; None: there are none

    def extended(self, extra: ExtraPairs | None) -> ItmPairs:
        """With extra pairs, at the end or in the place of hardest texts. The loss stays the mean over all pairs of weight 1."""
        if extra is None:
            return self
        if not extra.in_place:
            columns = ("image_index", "text_index", "label", "weight")
            joined = {name: torch.cat([getattr(self, name), getattr(extra, name)]) for name in columns}
            before = torch.zeros_like(self.label, dtype=torch.bool) if self.extra is None else self.extra
            is_extra = torch.cat([before, torch.ones_like(extra.label, dtype=torch.bool)])
            return ItmPairs(**joined, extra=is_extra)
        taken = extra.weight > 0  # an image without an extra pair keeps its hardest text

        def put(new: Tensor, old: Tensor) -> Tensor:
            own, hardest, of_texts = old.chunk(3)
            return torch.cat([own, torch.where(taken, new, hardest), of_texts])

        return ItmPairs(
            self.image_index,
            put(extra.text_index, self.text_index),
            put(extra.label, self.label),
            put(extra.weight, self.weight),
            extra=put(taken, torch.zeros_like(self.label, dtype=torch.bool)),
        )


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
    """Cross-entropy of the matching head, averaged over the pairs that remain (MAFA eq. 3): [P, 2], column 1 "matches" -> []."""
    per_pair = F.cross_entropy(logits.float(), pairs.label, reduction="none")
    return (per_pair * pairs.weight).sum() / pairs.weight.sum()


def itm_accuracy(logits: Tensor, pairs: ItmPairs) -> tuple[Tensor, Tensor]:
    """Share of right answers on pairs labelled positive and on pairs labelled negative (NaN where there is none)."""
    right = (logits.argmax(dim=1) == pairs.label).float() * pairs.weight
    positive = pairs.label.float() * pairs.weight
    negative = (1 - pairs.label).float() * pairs.weight
    return (right * positive).sum() / positive.sum(), (right * negative).sum() / negative.sum()
