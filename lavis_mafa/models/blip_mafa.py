"""``blip_mafa``: BLIP on LAVIS's encoders with MAFA's step. One class gives BLIP and MAFA by YAML."""

from __future__ import annotations

from typing import Any

import torch
from lavis.models.base_model import BaseModel
from lavis.models.blip_models.blip_outputs import BlipOutputFeatures
from torch import Tensor, nn

from lavis_mafa.common.distributed import gather_own_first
from lavis_mafa.common.model_settings import BlipBlock
from lavis_mafa.models.albef_encoders import build_image_encoder
from lavis_mafa.models.blip_encoders import build_blip_text, build_blip_tokenizer
from lavis_mafa.models.blip_pairs import BlipPairs, match, match_states
from lavis_mafa.models.dual_encoder import DualEncoder
from lavis_mafa.models.mafa_model import CONFIGS, PROJECTIONS
from lavis_mafa.models.retrieval_scoring import in_fp32
from lavis_mafa.objectives import EncodedBatch


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
