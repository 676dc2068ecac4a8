"""``blip_mafa``: BLIP on LAVIS's encoders with MAFA's step. One class gives BLIP and MAFA by YAML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lavis.models.blip_models.blip_outputs import BlipOutputFeatures
from torch import Tensor

from lavis_mafa.config.schema import BlipBlock
from lavis_mafa.distributed import gather_own_first
from lavis_mafa.models.base import CONFIGS, PROJECTIONS, DualEncoder, Texts
from lavis_mafa.models.encoders import build_blip_text, build_blip_tokenizer
from lavis_mafa.models.step import Encoded, StepInputs
from lavis_mafa.objectives import language_modelling_loss


@dataclass
class BlipPairs:
    """K images as token states and K texts as ids; an index may name any of them, also those gathered from other ranks."""

    model: BlipMafa
    image_embeds: Tensor  # [K, N, width]
    text_ids: Tensor  # [K, T]
    text_mask: Tensor  # [K, T]

    def itm_logits(self, image_index: Tensor, text_index: Tensor) -> Tensor:
        """[P], [P] -> [P, 2] in one pass."""
        ids, mask, images = self._rows(image_index, text_index)
        return self.model.itm_head(self.model.fuse(images, (ids, mask))[:, 0])

    def lm_loss(self, image_index: Tensor, text_index: Tensor) -> Tensor:
        """[P], [P] -> []: each token of a text predicted from those before it and its image, labels smoothed by 0.1 as in LAVIS."""
        ids, mask, images = self._rows(image_index, text_index)
        tokenizer, decoder = self.model.tokenizer, self.model.text_decoder
        ids = led_by(tokenizer.bos_token_id, ids)
        states = decoder.bert(
            ids, attention_mask=mask, encoder_hidden_states=images, return_dict=True, is_decoder=True, use_cache=False
        ).last_hidden_state
        return language_modelling_loss(states, ids, decoder.cls, tokenizer.pad_token_id)

    def _rows(self, image_index: Tensor, text_index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ids, mask = self.text_ids.index_select(0, text_index), self.text_mask.index_select(0, text_index)
        return ids, mask, self.image_embeds.index_select(0, image_index)


def led_by(token: int, ids: Tensor) -> Tensor:
    """Another first token: [P, T] -> [P, T]."""
    return torch.cat([torch.full_like(ids[:, :1], token), ids[:, 1:]], dim=1)


class BlipMafa(DualEncoder[BlipBlock]):
    """BLIP with MAFA (MAFA sections 4.1, 4.2). With momentum distillation it is LAVIS's ``blip_pretrain``.

    Parameter names are LAVIS's, so a checkpoint loads into ``blip_pretrain``, ``blip_image_text_matching`` and ``blip_caption``, with a
    momentum model into ``blip_retrieval`` too, and LAVIS's BLIP checkpoints load here.

    Example:
        >>> from lavis.models import load_model
        >>> model = load_model("blip_mafa", "tiny")
    """

    feature_output = BlipOutputFeatures
    of_multimodal = ("image_embeds", "multimodal_embeds")
    not_scoring = (*DualEncoder.not_scoring, "text_decoder")
    trained_by = {
        PROJECTIONS: {"itc"},
        r"itm_head\.": {"itm"},
        r"text_decoder\.": {"lm"},  # what it does not share with the text encoder
        r"text_encoder\..*\.attention\.": {"itc", "itm"},
        r"text_encoder\..*\.crossattention\.": {"itm", "lm"},
    }
    ramp_up_epochs = 2  # as in LAVIS; and only ITC is distilled
    PRETRAINED_MODEL_CONFIG_DICT = {kind: str(CONFIGS / f"blip_mafa_{kind}.yaml") for kind in ("base", "tiny")}
    text_decoder: Any

    def build_tokenizer(self, name: str) -> Any:
        return build_blip_tokenizer(name)

    def add_text(self, settings: Any, encoder_width: int, words: int) -> None:
        self.text_encoder, self.text_decoder = build_blip_text(settings, encoder_width, words)

    def encode(self, inputs: StepInputs) -> Encoded:
        ids, mask = self.tokenize(inputs.captions, self.gathers)
        images, image_feature = self.image_rows(inputs.image)
        text_feature = self.text_features((ids, mask))
        batch, _ = self.contrast_with_queue(inputs, image_feature, text_feature, ids, mask)
        if self.gathers:
            images = gather_own_first(images, with_gradient=True)
            ids, mask = gather_own_first(ids), gather_own_first(mask)
        return Encoded(BlipPairs(self, images, ids, mask), batch, (image_feature.detach(), text_feature.detach()))

    def fuse(self, image_tokens: Tensor, texts: Texts) -> Tensor:
        """Each text, whose [CLS] becomes [ENC], is read together with its image."""
        ids, mask = texts
        ids = led_by(self.tokenizer.enc_token_id, ids)
        return self.text_encoder(ids, attention_mask=mask, encoder_hidden_states=image_tokens, return_dict=True).last_hidden_state
