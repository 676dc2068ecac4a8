"""ALBEF as a PairModel: the encoded batch, its matching logits and its masked-LM loss by pair lists.

``albef_mafa``: ALBEF on LAVIS's encoders with MAFA's step. One class gives ALBEF, GRIT-VLP and MAFA by YAML.
"""

from __future__ import annotations

from typing import Any

import torch
from lavis.models.albef_models.albef_outputs import AlbefOutputFeatures
from lavis.models.base_model import BaseModel
from torch import Tensor, nn

from lavis_mafa.config.schema import AlbefBlock, loss_weights
from lavis_mafa.distributed import gather_own_first
from lavis_mafa.models.base import CONFIGS, PROJECTIONS, DualEncoder
from lavis_mafa.models.bert import build_tokenizer, with_bert
from lavis_mafa.models.encoders import build_image_encoder, build_text_encoder
from lavis_mafa.models.retrieval import in_fp32
from lavis_mafa.objectives import EncodedBatch, mask_tokens, masked_lm_loss
from lavis_mafa.objectives.lm import IGNORED


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


class AlbefMafa(DualEncoder[AlbefBlock], BaseModel):
    """ALBEF with MAFA (MAFA sections 4.1, 4.2).

    Parameter names are LAVIS's, so a checkpoint loads into ``albef_retrieval`` and ``albef_classification``, with a momentum teacher
    into ``albef_vqa`` too, and LAVIS's ALBEF checkpoints load here. LAVIS's ``albef_nlvr`` has other text layers.

    Example:
        >>> from lavis.models import load_model
        >>> model = load_model("albef_mafa", "tiny")
    """

    lm_loss_name = "loss_mlm"
    rank_by = "itm"
    feature_output = AlbefOutputFeatures
    of_multimodal = ("image_embeds", "image_embeds_proj", "text_embeds", "text_embeds_proj", "multimodal_embeds")
    PRETRAINED_MODEL_CONFIG_DICT = {
        "base": str(CONFIGS / "albef_mafa_base.yaml"),
        "tiny": str(CONFIGS / "albef_mafa_tiny.yaml"),
    }

    def __init__(self, settings: AlbefBlock) -> None:
        super().__init__()
        self.settings = settings
        self.tokenizer = build_tokenizer(settings.tokenizer)
        self.visual_encoder = build_image_encoder(settings.image_encoder)
        self.text_encoder = build_text_encoder(settings.text_encoder, settings.image_encoder.width, len(self.tokenizer))
        self.vision_proj = nn.Linear(settings.image_encoder.width, settings.embed_dim)
        self.text_proj = nn.Linear(settings.text_encoder.width, settings.embed_dim)
        self.itm_head = nn.Linear(settings.text_encoder.width, 2)
        self.temp = nn.Parameter(torch.tensor(settings.temperature))
        fusion = range(settings.text_encoder.fusion_layer, settings.text_encoder.layers)
        self.trained_by = {
            PROJECTIONS: {"itc"},
            r"itm_head\.": {"itm"},
            r"text_encoder\.cls\.": {"lm"},
            rf"text_encoder\.bert\.encoder\.layer\.({'|'.join(map(str, fusion))})\.": {"itm", "lm"},
        }
        self._prepare_mafa()
        distillation = settings.itc.momentum_distillation
        if distillation is not None:
            self._add_teacher(distillation.queue_size)

    def encode(self, samples: dict[str, Any]) -> tuple[AlbefPairs, EncodedBatch, tuple[Tensor, Tensor]]:
        """Both encoders once: pair lists for ITM and MLM, similarities for ITC and mining, features [B, d] for GRIT."""
        gathered = self.batch_scope == "global"
        image_embeds, text_embeds, ids, mask = self._token_states(samples, gathered)
        image_feature, text_feature = self.image_feature(image_embeds), self.text_feature(text_embeds)
        batch, teacher_images = self._contrast(samples, image_feature, text_feature, ids, mask)
        distillation = self.settings.itc.momentum_distillation
        if distillation is not None and not (distillation.mlm and loss_weights(self.settings)["mlm"]):
            teacher_images = None  # nobody asks it about words
        if gathered:
            image_embeds = gather_own_first(image_embeds, with_gradient=True)
            text_embeds = gather_own_first(text_embeds, with_gradient=True)
            ids, mask = gather_own_first(ids), gather_own_first(mask)
            teacher_images = None if teacher_images is None else gather_own_first(teacher_images)
        pairs = AlbefPairs(self, image_embeds, text_embeds, ids, mask, teacher_images, batch.distillation)
        return pairs, batch, (image_feature.detach(), text_feature.detach())

    def by_own_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """LAVIS's ``albef_retrieval`` has its text encoder without ``bert.`` in the names."""
        return with_bert(state)

    def fused(self, image_embeds: Tensor, text_embeds: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return fuse(self.text_encoder.bert, text_embeds, mask, image_embeds)

    # --- retrieval -------------------------------------------------------------------------------------------------

    def text_rows(self, captions: list[str]) -> tuple[tuple[Tensor, Tensor], Tensor]:
        ids, mask = self.tokenize(captions)
        states = self.text_states(ids, mask)
        return (states, mask), self.text_feature(states)

    def match_rows(self, image_states: Tensor, text: tuple[Tensor, ...]) -> Tensor:
        states, mask = text
        return in_fp32(self.itm_head, fuse(self.text_encoder.bert, states, mask, image_states)[:, 0])
