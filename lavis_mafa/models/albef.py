"""``albef_mafa``: ALBEF with MAFA's step. One class gives ALBEF, GRIT-VLP and MAFA by YAML."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lavis.models.albef_models.albef_outputs import AlbefOutputFeatures
from torch import Tensor

from lavis_mafa.config.schema import AlbefBlock, loss_weights
from lavis_mafa.distributed import gather_own_first
from lavis_mafa.models.base import CONFIGS, PROJECTIONS, DualEncoder, Texts
from lavis_mafa.models.encoders import build_text_encoder, build_tokenizer, with_bert
from lavis_mafa.models.momentum import project
from lavis_mafa.models.step import DualPairs, Encoded, StepInputs
from lavis_mafa.models.synthetic_texts import Guess, by_teacher, tokens_of
from lavis_mafa.models.transformer import KeysValues, Reading, Tokens, named_images, on_device
from lavis_mafa.objectives import mask_tokens, masked_lm_loss
from lavis_mafa.objectives.lm import IGNORED


@dataclass
class AlbefPairs(DualPairs):
    """Texts as token states, which fusion layers read with images; an index may name any of them, also those from other ranks."""

    text_embeds: Tensor  # [K or K + B, T, width]
    text_ids: Tensor  # LongTensor[K, T] on the host
    momentum_image_embeds: Tensor | None = None  # [K, N, width]
    distillation: float = 0.0
    teacher_states: Tensor | None = None  # [K, T, width of the language teacher], of the whole texts

    def itm_logits(self, image_index: Tensor, text_index: Tensor) -> Tensor:
        """[P], [P] -> [P, 2] in one fusion pass."""
        images, reading = self.reading(image_index, text_index, masked=True)
        return self.model.itm_head(self.model.fuse(images, self.text_embeds, reading, reading.first))

    def lm_loss(self, image_index: Tensor, text_index: Tensor) -> Tensor:
        """[P], [P] -> []: masked tokens of each text predicted with its image; last layer and head run on masked positions only."""
        model = self.model
        images, reading = self.reading(image_index, text_index)
        ids, labels = model.masked(self.text_ids.flatten().index_select(0, reading.rows))
        masked = torch.nonzero(labels != IGNORED).flatten()
        ids, labels = on_device(ids, model.device), on_device(labels.index_select(0, masked), model.device)
        chosen = reading.tokens_at(masked)
        logits = model.predict(model.text_encoder, ids, reading, images, chosen)
        soft, share = None, self.distillation
        if self.momentum_image_embeds is not None:
            with torch.no_grad():
                images_m = model.text_encoder_m.bert.keys_values(named_images(self.momentum_image_embeds, image_index)[0])
                soft = model.predict(model.text_encoder_m, ids, reading, images_m, chosen)
        elif self.teacher_states is not None:
            soft, share = self._of_language(reading.rows.index_select(0, masked)), model.settings.mlm.cross_distillation
            self.metrics["teacher_top1"] = (soft.argmax(dim=1) == labels).float().mean()
            soft = soft / model.settings.mlm.temperature
        return masked_lm_loss(logits, labels, soft, share)

    def _of_language(self, rows: Tensor) -> Tensor:
        """What the language teacher expects at places among K * T, LongTensor[N] on the host: -> logits [N, words]."""
        teacher, states = self.model.language_teacher, self.teacher_states
        assert teacher is not None and states is not None
        return teacher.predict(states.flatten(0, 1).index_select(0, on_device(rows, states.device)))


class AlbefMafa(DualEncoder[AlbefBlock]):
    """ALBEF with MAFA (MAFA sections 4.1, 4.2).

    Parameter names are LAVIS's, so a checkpoint loads into ``albef_retrieval`` and ``albef_classification``, and LAVIS's ALBEF
    checkpoints load here. What LAVIS's classes need besides (teacher, queues, other layers) ``lavis-mafa export`` adds.

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
        ids, mask = self.words(inputs.captions, self.gathers)
        own = ids[: len(inputs.captions)], mask[: len(inputs.captions)]
        shown = self._shown(own[0])
        images, texts = self.image_states(inputs.image), self.text_states(shown, own[1])
        image_feature, text_feature = self.image_features(images), project(self.text_proj, texts[:, 0])
        batch, momentum_images = self.contrast_with_queue(inputs, image_feature, text_feature, *own)
        distillation = self.settings.itc.momentum_distillation
        if distillation is not None and not (distillation.mlm and loss_weights(self.settings)["mlm"]):
            momentum_images = None  # nobody asks it about words
        teacher_states = None
        if self.language_teacher is not None and self.settings.mlm.cross_distillation and loss_weights(self.settings)["mlm"]:
            teacher_states = self.language_teacher.states(*own, self.reading(own[1]))
        synthetic = self.synthetic_texts(inputs, *own, len(mask), self._guess(own[1], teacher_states))
        synthetic_states = None if synthetic is None else self.text_states(synthetic.masked_as(own[0], shown), synthetic.mask)
        if self.gathers:
            images, texts = gather_own_first(images, with_gradient=True), gather_own_first(texts, with_gradient=True)
            momentum_images = None if momentum_images is None else gather_own_first(momentum_images)
            teacher_states = None if teacher_states is None else gather_own_first(teacher_states)
        metrics = {}
        if synthetic is not None and synthetic_states is not None:
            batch.extra, metrics = synthetic.pairs, synthetic.metrics
            texts, mask = torch.cat([texts, synthetic_states]), torch.cat([mask, synthetic.mask])
        teachers = momentum_images, batch.distillation, teacher_states
        pairs = AlbefPairs(self, batch.candidates, images, mask, texts, ids, *teachers, metrics=metrics)
        self.add_masked_images(batch, pairs, texts[: len(shown)], shown, own[1])
        return Encoded(pairs, batch, (image_feature.detach(), text_feature.detach()))

    def _shown(self, ids: Tensor) -> Tensor:
        """What ITC and ITM read of texts: with ``mlm.mask_everywhere`` words are masked there too, by a draw of their own."""
        mlm = self.settings.mlm
        return self.masked(ids)[0] if self.training and mlm.mask_everywhere and loss_weights(self.settings)["mlm"] else ids

    def masked(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Words as masked language modelling shows them, and what is to be predicted: see :func:`mask_tokens`."""
        tokenizer = self.tokenizer
        special = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id]
        return mask_tokens(ids, self.settings.mlm.mask_probability, tokenizer.mask_token_id, len(tokenizer), special)

    def _guess(self, mask: Tensor, teacher_states: Tensor | None) -> Guess | None:
        """Who says which words fit in B texts (``itm.synthetic.generator``); None: the teacher, if there is one.

        ``teacher_states``: [B, T, width of the language teacher] of the whole texts, where it has read them.
        """
        how = self.settings.itm.synthetic
        if how is not None and how.generator == "model":
            return partial(self._without_image, mask)
        if teacher_states is None or self.language_teacher is None:
            return None
        return by_teacher(self.language_teacher, mask, self.device, teacher_states)

    @torch.no_grad()
    def _without_image(self, mask: Tensor, masked: Tensor, whole: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """What masked language modelling expects at a place of each text, all of an image's being zero: see :data:`Guess`."""
        images = self.keys_values(torch.zeros(1, 1, self.settings.image_encoder.width, device=self.device))
        every = torch.arange(len(mask))
        reading = Reading.of(mask, self.device, every, torch.zeros_like(every), 1)
        chosen = reading.tokens_at(tokens_of(mask, place))
        fits, known = (self.predict(self.text_encoder, reading.take(ids), reading, images, chosen) for ids in (masked, whole))
        return fits, known

    def text_tokens(self, captions: list[str], gathered: bool = False) -> Texts:
        """Texts are read once, and then fused with any image."""
        ids, mask = self.words(captions, gathered)
        states = self.text_states(ids[: len(captions)], mask[: len(captions)])
        return gather_own_first(states) if gathered else states, mask

    def text_states(self, ids: Tensor, mask: Tensor, padded: bool = False, encoder: Any = None) -> Tensor:
        """The text layers: [B, T] -> [B, T, width]; 0 after each text's last word, unless ``padded``: what LAVIS has there."""
        reading, bert = self.reading(mask, padded), (encoder or self.text_encoder).bert
        states = bert.read(ids, reading, layers=slice(0, bert.fusion_layer))
        states = reading.tokens.texts.spread(states)
        return F.pad(states, (0, 0, 0, mask.shape[1] - states.shape[1]))

    def first_states(self, texts: Texts) -> Tensor:
        return texts[0][:, 0]

    def momentum_text_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.text_states(ids, mask, encoder=self.text_encoder_m)

    def keys_values(self, image_tokens: Tensor) -> KeysValues:
        return self.text_encoder.bert.keys_values(image_tokens)

    def fuse(
        self, images: KeysValues, texts: Tensor, reading: Reading, chosen: Tokens | None = None, layers: int | None = None
    ) -> Tensor:
        bert = self.text_encoder.bert
        run = slice(bert.fusion_layer, None if layers is None else bert.fusion_layer + layers)
        return bert(reading.take(texts), reading.tokens, images, chosen, layers=run)

    def fused(self, ids: Tensor, states: Tensor) -> Tensor:
        return states

    def predict(self, encoder: Any, ids: Tensor, reading: Reading, images: KeysValues, chosen: Tokens) -> Tensor:
        """Words LongTensor[S] with images -> logits [N, words] of the N ``chosen``."""
        bert = encoder.bert
        return encoder.cls(bert(bert.embeddings(ids, reading.positions), reading.tokens, images, chosen))

    def own_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """LAVIS's ``albef_retrieval`` has its text encoder without ``bert.`` in the names."""
        return super().own_weights(with_bert(state))
