"""The perfect Con-D of data whose truth is known: an upper bound (MAFA Table 16), never a training method for real data."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lavis_mafa.common.distributed import gather_own_first
from lavis_mafa.datasets.ground_truth import GroundTruth


class GroundTruthDiscriminator:
    """Probability 1 where the concepts match and 0 elsewhere; selected only by the name ``ground_truth``."""

    def __init__(self, truth: GroundTruth) -> None:
        self.truth = truth

    def match_probability(self, samples: dict[str, Any], image_index: Tensor, text_index: Tensor) -> Tensor:
        """[P], [P] -> [P]; ``samples`` must carry ``concept`` and ``text_key`` LongTensor[B]."""
        concept, text_key = samples["concept"].to(image_index.device), samples["text_key"].to(image_index.device)
        if samples.get("gathered", False):
            concept, text_key = gather_own_first(concept), gather_own_first(text_key)
        return self.truth.matches(concept[image_index].cpu(), text_key[text_index].cpu()).float().to(image_index.device)
