"""``albef_ve_mafa``: ALBEF for visual entailment (ALBEF section 5, SNLI-VE)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lavis_mafa.config.data import ENTAILMENT
from lavis_mafa.config.schema import AlbefVeBlock
from lavis_mafa.models.base import CONFIGS
from lavis_mafa.models.downstream import AlbefClassifier
from lavis_mafa.models.transformer import Reading


class AlbefVeMafa(AlbefClassifier[AlbefVeBlock]):
    """Whether a sentence contradicts an image (0), follows from it (2), or neither (1).

    Equal to LAVIS's ``albef_classification``, which ramps alpha up within the first epoch.

    Example:
        >>> from lavis.models import load_model
        >>> model = load_model("albef_ve_mafa", "tiny")
    """

    PRETRAINED_MODEL_CONFIG_DICT = {kind: str(CONFIGS / f"albef_ve_mafa_{kind}.yaml") for kind in ("base", "tiny")}
    classes = len(ENTAILMENT)

    def logits(self, samples: dict[str, Any], whose: str = "") -> Tensor:
        """[B, 3]; ``whose``: ``_m`` for the teacher's."""
        visual_encoder, text_encoder, cls_head = (getattr(self, f"{part}{whose}") for part in self.taught)
        ids, mask = self.words(samples["text_input"])
        pairs = torch.arange(len(ids))
        reading = Reading.of(mask, self.device, pairs, pairs, len(ids))
        images = text_encoder.keys_values(visual_encoder.forward_features(samples["image"]))
        logits: Tensor = cls_head(text_encoder.read(ids, reading, images=images, chosen=reading.first))
        return logits
