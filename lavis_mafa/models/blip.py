"""``blip_mafa``: BLIP with MAFA's step. One class gives BLIP and MAFA by YAML."""

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
from lavis_mafa.models.step import DualPairs, Encoded, StepInputs
from lavis_mafa.models.transformer import KeysValues, Reading, Tokens
from lavis_mafa.objectives import language_modelling_loss


@dataclass
class BlipPairs(DualPairs):
    """Texts as ids; an index may name any of them, also those gathered from other ranks."""

    text_ids: Tensor  # LongTensor[K, T] on the host, or [K + B, T] on the device

    def itm_logits(self, image_index: Tensor, text_index: Tensor) -> Tensor:
        """[P], [P] -> [P, 2] in one pass."""
        images, reading = self.reading(image_index, text_index, masked=True)
        return self.model.itm_head(self.model.fuse(images, self.text_ids, reading, reading.first))

    def lm_loss(self, image_index: Tensor, text_index: Tensor) -> Tensor:
        """[P], [P] -> []: each token of a text predicted from those before it and its image, labels smoothed by 0.1 as in LAVIS."""
        decoder, (images, reading) = self.model.text_decoder, self.reading(image_index, text_index)
        ids = led_by(self.model.tokenizer.bos_token_id, self.text_ids)
        states = decoder.bert.read(ids, reading, images=images, causal=True)
        followed, words = reading.followed(), reading.take(ids)
        return language_modelling_loss(states.index_select(0, followed), words.index_select(0, followed + 1), decoder.cls)


def led_by(token: int, ids: Tensor) -> Tensor:
    """Another first token: [P, T] -> [P, T]."""
    return torch.cat([torch.full_like(ids[:, :1], token), ids[:, 1:]], dim=1)


class BlipMafa(DualEncoder[BlipBlock]):
    """BLIP with MAFA (MAFA sections 4.1, 4.2). With momentum distillation it is LAVIS's ``blip_pretrain``.

    Parameter names are LAVIS's, so a checkpoint loads into ``blip_pretrain``, ``blip_image_text_matching`` and ``blip_caption``, and
    LAVIS's BLIP checkpoints load here. What its other classes need besides (teacher, queues) ``lavis-mafa export`` adds.

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
        ids, mask = self.words(inputs.captions, self.gathers)
        own = ids[: len(inputs.captions)], mask[: len(inputs.captions)]
        images, image_feature = self.image_rows(inputs.image)
        text_feature = self.text_features(own)
        batch, _ = self.contrast_with_queue(inputs, image_feature, text_feature, *own)
        if self.gathers:
            images = gather_own_first(images, with_gradient=True)
        pairs = BlipPairs(self, batch.candidates, images, mask, ids)
        self.add_masked_images(batch, pairs, own[0], *own)
        if (synthetic := self.synthetic_texts(inputs, *own, len(mask))) is not None:
            batch.extra, pairs.metrics = synthetic.pairs, synthetic.metrics
            pairs.text_ids, pairs.text_mask = synthetic.following(ids, mask)
        return Encoded(pairs, batch, (image_feature.detach(), text_feature.detach()))

    def text_states(self, ids: Tensor, mask: Tensor, padded: bool = False) -> Tensor:
        reading = self.reading(mask, padded)
        return reading.tokens.texts.spread(self.text_encoder.read(ids, reading))

    def first_states(self, texts: Texts) -> Tensor:
        reading = self.reading(texts[1])
        return self.text_encoder.read(texts[0], reading, chosen=reading.first)

    def momentum_text_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        reading = self.reading(mask)
        return self.text_encoder_m.read(ids, reading, chosen=reading.first)[:, None]

    def keys_values(self, image_tokens: Tensor) -> KeysValues:
        return self.text_encoder.keys_values(image_tokens)

    def fuse(
        self, images: KeysValues, texts: Tensor, reading: Reading, chosen: Tokens | None = None, layers: int | None = None
    ) -> Tensor:
        """Each text, whose [CLS] becomes [ENC], is read together with its image."""
        texts = led_by(self.tokenizer.enc_token_id, texts)
        return self.text_encoder.read(texts, reading, images=images, chosen=chosen, layers=slice(layers))
