"""ALBEF as a PairModel: the encoded batch, its matching logits and its masked-LM loss by pair lists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lavis_mafa.objectives import mask_tokens, masked_lm_loss
from lavis_mafa.objectives.masked_lm import IGNORED

if TYPE_CHECKING:
    from lavis_mafa.models.albef_mafa import AlbefMafa


class AlbefPairs:
    """K images and K texts as token states; an index may name any of them, also those gathered from other ranks."""

    def __init__(
        self,
        model: AlbefMafa,
        image_embeds: Tensor,  # [K, N, width]
        text_embeds: Tensor,  # [K, T, width]
        text_ids: Tensor,  # [K, T]
        text_mask: Tensor,  # [K, T]
        teacher_image_embeds: Tensor | None = None,
        distillation: float = 0.0,
    ) -> None:
        self.model = model
        self.image_embeds, self.text_embeds = image_embeds, text_embeds
        self.text_ids, self.text_mask = text_ids, text_mask
        self.teacher_image_embeds, self.distillation = teacher_image_embeds, distillation

    def itm_logits(self, image_index: Tensor, text_index: Tensor) -> Tensor:
        """[P], [P] -> [P, 2] in one fusion pass."""
        states = fuse(
            self.model.text_encoder.bert,
            self.text_embeds.index_select(0, text_index),
            self.text_mask.index_select(0, text_index),
            self.image_embeds.index_select(0, image_index),
        )
        return self.model.itm_head(states[:, 0])

    def lm_loss(self, image_index: Tensor, text_index: Tensor) -> Tensor:
        """[P], [P] -> []: masked tokens of each text predicted with its image; the head runs on masked positions only."""
        model = self.model
        tokenizer = model.tokenizer
        ids, labels = mask_tokens(
            self.text_ids.index_select(0, text_index),
            model.settings.mlm.mask_probability,
            tokenizer.mask_token_id,
            len(tokenizer),
            [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id],
        )
        mask = self.text_mask.index_select(0, text_index)
        positions = torch.nonzero(labels.flatten() != IGNORED).flatten()
        logits = self._predict(model.text_encoder, ids, mask, self.image_embeds.index_select(0, image_index), positions)
        teacher_logits = None
        if self.teacher_image_embeds is not None:
            with torch.no_grad():
                images = self.teacher_image_embeds.index_select(0, image_index)
                teacher_logits = self._predict(model.text_encoder_m, ids, mask, images, positions)
        return masked_lm_loss(logits, labels.flatten()[positions], teacher_logits, self.distillation)

    def _predict(self, encoder: Any, ids: Tensor, mask: Tensor, images: Tensor, positions: Tensor) -> Tensor:
        states = encoder.bert(
            ids,
            attention_mask=mask,
            encoder_hidden_states=images,
            encoder_attention_mask=torch.ones(images.shape[:2], dtype=torch.long, device=images.device),
            return_dict=True,
        ).last_hidden_state
        return encoder.cls(states.flatten(0, 1).index_select(0, positions))


def fuse(bert: Any, text_embeds: Tensor, text_mask: Tensor, image_embeds: Tensor) -> Tensor:
    """LAVIS's fusion layers on P pairs: [P, T, width], [P, T], [P, N, width] -> [P, T, width]."""
    return bert(
        encoder_embeds=text_embeds,
        attention_mask=text_mask,
        encoder_hidden_states=image_embeds,
        encoder_attention_mask=torch.ones(image_embeds.shape[:2], dtype=torch.long, device=image_embeds.device),
        return_dict=True,
        mode="fusion",
    ).last_hidden_state
