"""BLIP as a PairModel: the encoded batch, its matching logits and its language-model loss by pair lists.

``blip_mafa``: BLIP on LAVIS's encoders with MAFA's step. One class gives BLIP and MAFA by YAML.
"""

from __future__ import annotations

from typing import Any

import torch
from lavis.models.base_model import BaseModel
from lavis.models.blip_models.blip_outputs import BlipOutputFeatures
from torch import Tensor, nn

from lavis_mafa.config.schema import BlipBlock
from lavis_mafa.distributed import gather_own_first
from lavis_mafa.models.base import CONFIGS, PROJECTIONS, DualEncoder
from lavis_mafa.models.encoders import build_blip_text, build_blip_tokenizer, build_image_encoder
from lavis_mafa.models.retrieval import in_fp32
from lavis_mafa.objectives import EncodedBatch, language_modelling_loss


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


class BlipMafa(DualEncoder[BlipBlock], BaseModel):
    """BLIP with MAFA (MAFA sections 4.1, 4.2). With momentum distillation it is LAVIS's ``blip_pretrain``.

    Parameter names are LAVIS's, so a checkpoint loads into ``blip_pretrain``, ``blip_image_text_matching`` and ``blip_caption``, with a
    momentum teacher into ``blip_retrieval`` too, and LAVIS's BLIP checkpoints load here.

    Example:
        >>> from lavis.models import load_model
        >>> model = load_model("blip_mafa", "tiny")
    """

    feature_output = BlipOutputFeatures
    of_multimodal = ("image_embeds", "multimodal_embeds")
    trained_by = {
        PROJECTIONS: {"itc"},
        r"itm_head\.": {"itm"},
        r"text_decoder\.": {"lm"},  # what it does not share with the text encoder
        r"text_encoder\..*\.attention\.": {"itc", "itm"},
        r"text_encoder\..*\.crossattention\.": {"itm", "lm"},
    }
    ramp_up_epochs = 2  # as in LAVIS; and only ITC is distilled
    PRETRAINED_MODEL_CONFIG_DICT = {
        "base": str(CONFIGS / "blip_mafa_base.yaml"),
        "tiny": str(CONFIGS / "blip_mafa_tiny.yaml"),
    }

    def __init__(self, settings: BlipBlock) -> None:
        super().__init__()
        self.settings = settings
        self.tokenizer = build_blip_tokenizer(settings.tokenizer)
        self.visual_encoder = build_image_encoder(settings.image_encoder)
        self.text_encoder, self.text_decoder = build_blip_text(settings.text_encoder, settings.image_encoder.width, len(self.tokenizer))
        self.vision_proj = nn.Linear(settings.image_encoder.width, settings.embed_dim)
        self.text_proj = nn.Linear(settings.text_encoder.width, settings.embed_dim)
        self.itm_head = nn.Linear(settings.text_encoder.width, 2)
        self.temp = nn.Parameter(torch.tensor(settings.temperature))
        self._prepare_mafa()
        distillation = settings.itc.momentum_distillation
        if distillation is not None:
            self._add_teacher(distillation.queue_size)

    def encode(self, samples: dict[str, Any]) -> tuple[BlipPairs, EncodedBatch, tuple[Tensor, Tensor]]:
        """Both encoders once: pair lists for ITM and LM, similarities for ITC and mining, features [B, d] for GRIT."""
        gathered = self.batch_scope == "global"
        image_embeds, text_embeds, ids, mask = self._token_states(samples, gathered)
        image_feature, text_feature = self.image_feature(image_embeds), self.text_feature(text_embeds)
        batch, _ = self._contrast(samples, image_feature, text_feature, ids, mask)
        if gathered:
            image_embeds = gather_own_first(image_embeds, with_gradient=True)
            ids, mask = gather_own_first(ids), gather_own_first(mask)
        return BlipPairs(self, image_embeds, ids, mask), batch, (image_feature.detach(), text_feature.detach())

    def fused(self, image_embeds: Tensor, text_embeds: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return match_states(self.text_encoder, ids, mask, image_embeds, self.tokenizer.enc_token_id)

    # --- retrieval -------------------------------------------------------------------------------------------------

    def text_rows(self, captions: list[str]) -> tuple[tuple[Tensor, Tensor], Tensor]:
        ids, mask = self.tokenize(captions)
        return (ids, mask), self.text_feature(self.text_states(ids, mask))

    def match_rows(self, image_states: Tensor, text: tuple[Tensor, ...]) -> Tensor:
        ids, mask = text
        return in_fp32(self.itm_head, match(self.text_encoder, ids, mask, image_states, self.tokenizer.enc_token_id))
