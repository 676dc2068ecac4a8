"""``albef_ve_mafa``: ALBEF for visual entailment (ALBEF section 5, SNLI-VE)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lavis.models.albef_models.albef_outputs import AlbefOutputWithLogits
from torch import Tensor, nn

from lavis_mafa.config.data import ENTAILMENT
from lavis_mafa.config.schema import AlbefVeBlock
from lavis_mafa.errors import UserError
from lavis_mafa.models.base import CONFIGS
from lavis_mafa.models.downstream import AlbefDownstream
from lavis_mafa.models.step import check_samples
from lavis_mafa.models.transformer import Reading
from lavis_mafa.objectives import distilled_targets


class AlbefVeMafa(AlbefDownstream[AlbefVeBlock]):
    """Whether a sentence contradicts an image (0), follows from it (2), or neither (1): an MLP on [CLS] of the fusion layers.

    The loss is cross-entropy. With ``momentum_distillation`` its targets are ``(1 - alpha) * label + alpha * teacher`` (ALBEF
    section 3.4), from the first step on. Equal to LAVIS's ``albef_classification``, which ramps alpha up within the first epoch.

    Example:
        >>> from lavis.models import load_model
        >>> model = load_model("albef_ve_mafa", "tiny")
    """

    PRETRAINED_MODEL_CONFIG_DICT = {kind: str(CONFIGS / f"albef_ve_mafa_{kind}.yaml") for kind in ("base", "tiny")}

    def __init__(self, settings: AlbefVeBlock) -> None:
        super().__init__(settings)
        width = settings.text_encoder.width
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, len(ENTAILMENT)))
        self._add_teacher()

    def forward(self, samples: dict[str, Any]) -> AlbefOutputWithLogits:
        """Loss and logits [B, 3] of samples with ``image`` [B, 3, H, W], ``text_input`` (B texts) and ``label`` LongTensor[B].

        Raises:
            UserError: samples that do not go together.
        """
        samples = self._checked(samples)
        logits = self.logits(samples)
        targets: Tensor = samples["label"]
        distillation = self.settings.momentum_distillation
        teacher = None
        if distillation is not None:
            with torch.no_grad():
                self._move_teacher(samples)
                teacher = self.logits(samples, "_m")
            targets = distilled_targets(F.one_hot(targets, len(ENTAILMENT)).float(), teacher, distillation.alpha)
        return AlbefOutputWithLogits(loss=F.cross_entropy(logits.float(), targets), logits=logits, logits_m=teacher)

    def logits(self, samples: dict[str, Any], whose: str = "") -> Tensor:
        """[B, 3]; ``whose``: ``_m`` for the teacher's."""
        visual_encoder, text_encoder, cls_head = (getattr(self, f"{part}{whose}") for part in self.taught)
        ids, mask = self.words(samples["text_input"])
        pairs = torch.arange(len(ids))
        reading = Reading.of(mask, self.device, pairs, pairs, len(ids))
        images = text_encoder.keys_values(visual_encoder.forward_features(samples["image"]))
        logits: Tensor = cls_head(text_encoder.read(ids, reading, images=images, chosen=reading.first))
        return logits

    @torch.no_grad()
    def predict(self, samples: dict[str, Any]) -> dict[str, Tensor]:
        """``predictions``, logits [B, 3], and ``targets``, the labels: as LAVIS's."""
        samples = self._checked(samples)
        return {"predictions": self.logits(samples), "targets": samples["label"]}

    def _checked(self, samples: dict[str, Any]) -> dict[str, Any]:
        samples = check_samples(samples, self.settings.image_encoder.image_size, "image", "text_input")
        label, count = samples.get("label"), len(samples["text_input"])
        if not isinstance(label, Tensor) or label.shape != (count,) or label.dtype != torch.long:
            raise UserError(f"samples['label'] is {label!r}; needed: a LongTensor [{count}].")
        return {**samples, "image": samples["image"].to(self.device), "label": label.to(self.device)}
