"""Con-D from a BLIP: LAVIS's ``blip_image_text_matching`` and ``blip_retrieval`` checkpoints, the authors', our ``blip_mafa``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lavis_mafa.discriminators.dual import DualDiscriminator
from lavis_mafa.models.albef_encoders import build_image_encoder
from lavis_mafa.models.blip_encoders import build_blip_text_encoder, build_blip_tokenizer
from lavis_mafa.models.blip_pairs import match


class BlipDiscriminator(DualDiscriminator):
    """BLIP's matching head: the text is read together with its image, after [ENC]."""

    def parts(self) -> dict[str, nn.Module]:
        settings = self.settings
        return {
            "visual_encoder": build_image_encoder(replace(settings.image_encoder, init=None)),
            "text_encoder": build_blip_text_encoder(settings.text_encoder, settings.image_encoder.width, len(self.tokenizer)),
            "itm_head": nn.Linear(settings.text_encoder.width, 2),
        }

    def build_tokenizer(self) -> Any:
        return build_blip_tokenizer(self.settings.tokenizer)

    def logits(self, text: Tensor, mask: Tensor, images: Tensor) -> Tensor:
        states = match(self.network["text_encoder"], text, mask, images, self.tokenizer.enc_token_id)
        return self.network["itm_head"](states)
