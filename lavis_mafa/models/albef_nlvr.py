"""``albef_nlvr_mafa``: ALBEF for statements about two images (ALBEF section 5; MAFA Table 3, NLVR2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lavis_mafa.config.data import STATEMENT
from lavis_mafa.config.schema import AlbefNlvrBlock
from lavis_mafa.models.base import CONFIGS
from lavis_mafa.models.downstream import AlbefClassifier
from lavis_mafa.models.two_images import TwoImages


class AlbefNlvrMafa(TwoImages[AlbefNlvrBlock], AlbefClassifier[AlbefNlvrBlock]):
    """Whether a sentence holds of two images (1) or not (0).

    Equal to LAVIS's ``albef_nlvr`` but for its teacher, which reads with the student's text encoder there and its own here, and whose
    weight alpha LAVIS ramps up within two epochs.

    Example:
        >>> from lavis.models import load_model
        >>> model = load_model("albef_nlvr_mafa", "tiny")
    """

    PRETRAINED_MODEL_CONFIG_DICT = {kind: str(CONFIGS / f"albef_nlvr_mafa_{kind}.yaml") for kind in ("base", "tiny")}
    images = ("image0", "image1")
    classes = len(STATEMENT)
    left_out = ", without the text assignment (albef_ta_mafa) that ALBEF trains between the two"

    def logits(self, samples: dict[str, Any], whose: str = "") -> Tensor:
        """[B, 2]; ``whose``: ``_m`` for the teacher's."""
        visual_encoder, text_encoder, cls_head = (getattr(self, f"{part}{whose}") for part in self.taught)
        states = visual_encoder.forward_features(torch.cat([samples[name] for name in self.images]))
        texts: list[str] = samples["text_input"]
        logits: Tensor = cls_head(self.read_two(text_encoder, texts, states, slice(len(texts)), slice(len(texts), None)))
        return logits
