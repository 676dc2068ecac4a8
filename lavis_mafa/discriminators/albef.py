"""Con-D from an ALBEF: LAVIS's ``albef_retrieval`` checkpoints, the authors', and our own ``albef_mafa``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lavis_mafa.discriminators.dual import DualDiscriminator
from lavis_mafa.models.albef_encoders import build_image_encoder, build_text_encoder
from lavis_mafa.models.albef_pairs import fuse
from lavis_mafa.models.bert import build_tokenizer, fold_token_type


class AlbefDiscriminator(DualDiscriminator):
    """ALBEF's matching head: each text is read once, then fused with its images."""

    def parts(self) -> dict[str, nn.Module]:
        settings = self.settings
        text = build_text_encoder(replace(settings.text_encoder, init=None), settings.image_encoder.width, len(self.tokenizer))
        return {
            "visual_encoder": build_image_encoder(replace(settings.image_encoder, init=None)),
            "text_encoder": text.bert,
            "itm_head": nn.Linear(settings.text_encoder.width, 2),
        }

    def build_tokenizer(self) -> Any:
        return build_tokenizer(self.settings.tokenizer)

    def wanted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = {name.replace("text_encoder.bert.", "text_encoder."): value for name, value in fold_token_type(state).items()}
        return {name: value for name, value in state.items() if not name.startswith(("text_encoder.cls.", "text_encoder.pooler."))}

    def text_rows(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        bert = self.network["text_encoder"]
        return bert(ids, attention_mask=mask, return_dict=True, mode="text").last_hidden_state, mask

    def logits(self, text: Tensor, mask: Tensor, images: Tensor) -> Tensor:
        return self.network["itm_head"](fuse(self.network["text_encoder"], text, mask, images)[:, 0])
