"""``albef_ta_mafa``: text assignment, the pre-training that prepares ALBEF for two images (ALBEF section 5)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lavis_mafa.config.schema import AlbefTaBlock
from lavis_mafa.models.albef_nlvr import TwoImages
from lavis_mafa.models.base import CONFIGS
from lavis_mafa.models.momentum import project
from lavis_mafa.models.step import PretrainOutput, check_samples
from lavis_mafa.objectives import assign_texts


class AlbefTaMafa(TwoImages[AlbefTaBlock]):
    """To which of two images a caption belongs: the first (0), the second (1), or neither (2); a linear layer on [CLS].

    ``vision_proj`` is that of pre-training and stays as it is: by its similarities an image is chosen that is easily mistaken.

    Example:
        >>> from lavis.models import load_model
        >>> model = load_model("albef_ta_mafa", "tiny")
    """

    PRETRAINED_MODEL_CONFIG_DICT = {kind: str(CONFIGS / f"albef_ta_mafa_{kind}.yaml") for kind in ("base", "tiny")}
    heads = ("ta_head",)

    def __init__(self, settings: AlbefTaBlock) -> None:
        super().__init__(settings)
        self.vision_proj = nn.Linear(settings.image_encoder.width, settings.embed_dim).requires_grad_(False)
        self.ta_head = nn.Linear(settings.text_encoder.width, 3)

    def forward(self, samples: dict[str, Any]) -> PretrainOutput:
        """Loss and ``ta_accuracy`` of samples with ``image`` [B, 3, H, W] and ``text_input`` (B captions), B at least 3.

        Raises:
            UserError: samples that do not go together.
        """
        samples = check_samples(samples, self.settings.image_encoder.image_size, "image", "text_input")
        states = self.visual_encoder.forward_features(samples["image"].to(self.device))
        with torch.no_grad():
            features = project(self.vision_proj, states[:, 0])
            assigned = assign_texts(features @ features.T)
        logits = self.ta_head(self.read_two(self.text_encoder, samples["text_input"], states, assigned.first, assigned.second))
        loss = F.cross_entropy(logits.float(), assigned.label)
        accuracy = (logits.argmax(dim=1) == assigned.label).float().mean()
        return PretrainOutput(loss=loss, metrics={"ta_accuracy": accuracy})
