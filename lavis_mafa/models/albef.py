"""``albef_mafa``: ALBEF on LAVIS's encoders with MAFA's step. One class gives ALBEF, GRIT-VLP and MAFA by YAML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lavis.models.albef_models.albef_outputs import AlbefOutputFeatures
from torch import Tensor

from lavis_mafa.config.schema import AlbefBlock, loss_weights
from lavis_mafa.distributed import gather_own_first
from lavis_mafa.models.base import CONFIGS, PROJECTIONS, DualEncoder, Texts
from lavis_mafa.models.encoders import build_text_encoder, build_tokenizer, with_bert
from lavis_mafa.models.step import Encoded, StepInputs
from lavis_mafa.objectives import mask_tokens, masked_lm_loss
from lavis_mafa.objectives.lm import IGNORED


@dataclass
class AlbefPairs:
    """K images and K texts as token states; an index may name any of them, also those gathered from other ranks."""

    model: AlbefMafa
    image_embeds: Tensor  # [K, N, width]
    text_embeds: Tensor  # [K, T, width]
    text_ids: Tensor  # [K, T]
    text_mask: Tensor  # [K, T]
    momentum_image_embeds: Tensor | None = None  # [K, N, width]
    distillation: float = 0.0

    def itm_logits(self, image_index: Tensor, text_index: Tensor) -> Tensor:
        """[P], [P] -> [P, 2] in one fusion pass."""
        texts = self.text_embeds.index_select(0, text_index), self.text_mask.index_select(0, text_index)
        return self.model.itm_head(self.model.fuse(self.image_embeds.index_select(0, image_index), texts)[:, 0])

    def lm_loss(self, image_index: Tensor, text_index: Tensor) -> Tensor:
        """[P], [P] -> []: masked tokens of each text predicted with its image; the head runs on masked positions only."""
        model, tokenizer = self.model, self.model.tokenizer
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
        momentum_logits = None
        if self.momentum_image_embeds is not None:
            with torch.no_grad():
                images = self.momentum_image_embeds.index_select(0, image_index)
                momentum_logits = self._predict(model.text_encoder_m, ids, mask, images, positions)
        return masked_lm_loss(logits, labels.flatten()[positions], momentum_logits, self.distillation)

    def _predict(self, encoder: Any, ids: Tensor, mask: Tensor, images: Tensor, positions: Tensor) -> Tensor:
        states = encoder.bert(
            ids,
            attention_mask=mask,
            encoder_hidden_states=images,
            encoder_attention_mask=torch.ones(images.shape[:2], dtype=torch.long, device=images.device),
            return_dict=True,
        ).last_hidden_state
        return encoder.cls(states.flatten(0, 1).index_select(0, positions))


class AlbefMafa(DualEncoder[AlbefBlock]):
    """ALBEF with MAFA (MAFA sections 4.1, 4.2).

    Parameter names are LAVIS's, so a checkpoint loads into ``albef_retrieval`` and ``albef_classification``, with a momentum model
    into ``albef_vqa`` too, and LAVIS's ALBEF checkpoints load here. LAVIS's ``albef_nlvr`` has other text layers.

    Example:
        >>> from lavis.models import load_model
        >>> model = load_model("albef_mafa", "tiny")
    """

    lm_loss_name = "loss_mlm"
    rank_by = "itm"
    feature_output = AlbefOutputFeatures
    of_multimodal = ("image_embeds", "image_embeds_proj", "text_embeds", "text_embeds_proj", "multimodal_embeds")
    not_scoring = (*DualEncoder.not_scoring, "text_encoder.cls")
    PRETRAINED_MODEL_CONFIG_DICT = {kind: str(CONFIGS / f"albef_mafa_{kind}.yaml") for kind in ("base", "tiny")}

    def build_tokenizer(self, name: str) -> Any:
        return build_tokenizer(name)

    def add_text(self, settings: Any, encoder_width: int, words: int) -> None:
        self.text_encoder = build_text_encoder(settings, encoder_width, words)
        fusion = range(settings.fusion_layer, settings.layers)
        self.trained_by = {
            PROJECTIONS: {"itc"},
            r"itm_head\.": {"itm"},
            r"text_encoder\.cls\.": {"lm"},
            rf"text_encoder\.bert\.encoder\.layer\.({'|'.join(map(str, fusion))})\.": {"itm", "lm"},
        }

    def encode(self, inputs: StepInputs) -> Encoded:
        ids, mask = self.tokenize(inputs.captions, self.gathers)
        images, texts = self.image_states(inputs.image), self.text_states(ids, mask)
        image_feature, text_feature = self.image_features(images), self.text_features((texts, mask))
        batch, momentum_images = self.contrast_with_queue(inputs, image_feature, text_feature, ids, mask)
        distillation = self.settings.itc.momentum_distillation
        if distillation is not None and not (distillation.mlm and loss_weights(self.settings)["mlm"]):
            momentum_images = None  # nobody asks it about words
        if self.gathers:
            images, texts = gather_own_first(images, with_gradient=True), gather_own_first(texts, with_gradient=True)
            ids, mask = gather_own_first(ids), gather_own_first(mask)
            momentum_images = None if momentum_images is None else gather_own_first(momentum_images)
        pairs = AlbefPairs(self, images, texts, ids, mask, momentum_images, batch.distillation)
        return Encoded(pairs, batch, (image_feature.detach(), text_feature.detach()))

    def text_inputs(self, ids: Tensor, mask: Tensor) -> Texts:
        """Texts are read once, and then fused with any image."""
        return self.text_states(ids, mask), mask

    def states_of(self, texts: Texts) -> Tensor:
        return texts[0]

    def fuse(self, image_tokens: Tensor, texts: Texts) -> Tensor:
        return self.text_encoder.bert(
            encoder_embeds=texts[0],
            attention_mask=texts[1],
            encoder_hidden_states=image_tokens,
            encoder_attention_mask=torch.ones(image_tokens.shape[:2], dtype=torch.long, device=image_tokens.device),
            return_dict=True,
            mode="fusion",
        ).last_hidden_state

    def own_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """LAVIS's ``albef_retrieval`` has its text encoder without ``bert.`` in the names."""
        return super().own_weights(with_bert(state))
