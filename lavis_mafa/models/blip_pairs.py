"""BLIP as a PairModel: the encoded batch, its matching logits and its language-model loss by pair lists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lavis_mafa.objectives import language_modelling_loss

if TYPE_CHECKING:
    from lavis_mafa.models.blip_mafa import BlipMafa


class BlipPairs:
    """K images as token states and K texts as ids; an index may name any of them, also those gathered from other ranks."""

    def __init__(
        self,
        model: BlipMafa,
        image_embeds: Tensor,  # [K, N, width]
        text_ids: Tensor,  # [K, T]
        text_mask: Tensor,  # [K, T]
    ) -> None:
        self.model, self.image_embeds = model, image_embeds
        self.text_ids, self.text_mask = text_ids, text_mask

    def itm_logits(self, image_index: Tensor, text_index: Tensor) -> Tensor:
        """[P], [P] -> [P, 2] in one pass."""
        ids, mask, images = self._rows(image_index, text_index)
        return self.model.itm_head(match(self.model.text_encoder, ids, mask, images, self.model.tokenizer.enc_token_id))

    def lm_loss(self, image_index: Tensor, text_index: Tensor) -> Tensor:
        """[P], [P] -> []: each token of a text predicted from those before it and its image, labels smoothed by 0.1 as in LAVIS."""
        ids, mask, images = self._rows(image_index, text_index)
        ids = led_by(self.model.tokenizer.bos_token_id, ids)
        decoder = self.model.text_decoder
        states = decoder.bert(
            ids, attention_mask=mask, encoder_hidden_states=images, return_dict=True, is_decoder=True, use_cache=False
        ).last_hidden_state
        return language_modelling_loss(states, ids, decoder.cls, self.model.tokenizer.pad_token_id)

    def _rows(self, image_index: Tensor, text_index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ids, mask = self.text_ids.index_select(0, text_index), self.text_mask.index_select(0, text_index)
        return ids, mask, self.image_embeds.index_select(0, image_index)


def match(text_encoder: Any, ids: Tensor, mask: Tensor, image_embeds: Tensor, enc_token_id: int) -> Tensor:
    """State of [ENC], which takes the place of [CLS], for P pairs: [P, T], [P, T], [P, N, width] -> [P, width]."""
    return match_states(text_encoder, ids, mask, image_embeds, enc_token_id)[:, 0]


def match_states(text_encoder: Any, ids: Tensor, mask: Tensor, image_embeds: Tensor, enc_token_id: int) -> Tensor:
    """All states of P texts read with their images: -> [P, T, width]."""
    ids = led_by(enc_token_id, ids)
    return text_encoder(ids, attention_mask=mask, encoder_hidden_states=image_embeds, return_dict=True).last_hidden_state


def led_by(token: int, ids: Tensor) -> Tensor:
    """Another first token: [P, T] -> [P, T]."""
    return torch.cat([torch.full_like(ids[:, :1], token), ids[:, 1:]], dim=1)
