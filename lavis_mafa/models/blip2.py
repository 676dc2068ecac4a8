"""``blip2_mafa``: stage 1 of BLIP-2 (the Q-Former) with MAFA's step."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from lavis.models.base_model import BaseModel
from lavis.models.blip2_models.blip2 import LayerNorm, disabled_train
from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
from torch import Tensor, nn

from lavis_mafa.config.schema import Blip2Block
from lavis_mafa.distributed import gather_own_first, gather_words
from lavis_mafa.errors import UserError
from lavis_mafa.models.base import CONFIGS, PROJECTIONS, MafaModel, Texts
from lavis_mafa.models.blip import led_by
from lavis_mafa.models.encoders import (
    build_blip2_tokenizer,
    build_eva,
    build_qformer,
    tokenize,
    with_own_file,
    without_vit,
)
from lavis_mafa.models.generation import Writing, write
from lavis_mafa.models.qformer import QFormerWords, together
from lavis_mafa.models.retrieval import without_autocast
from lavis_mafa.models.step import Encoded, StepInputs, check_lengths
from lavis_mafa.models.transformer import POSITIONS, KeysValues, Reading, named_images, numbers, on_device
from lavis_mafa.models.vit import fit_position_embeddings
from lavis_mafa.objectives import language_modelling_loss
from lavis_mafa.objectives.mining import most_similar_query


@dataclass
class Blip2Pairs:
    """K images as ViT states and K texts as ids; an index may name any of them, also those gathered from other ranks.

    Synthetic texts follow the K, for matching alone.
    """

    model: Blip2Mafa
    image_embeds: Tensor  # [K, N, vision width]
    text_ids: Tensor  # LongTensor[K, T] on the host, or [K + B, T] on the device
    text_mask: Tensor  # BoolTensor[K or K + B, T] on the host
    own: int  # B, the batch's own images and texts, which come first
    vit_states: Tensor | None = None  # [K, N, vision width] before ln_vision, of a frozen ViT: a Con-D may have the same one
    metrics: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def keys_values(self) -> KeysValues:
        """Of own images once, for all that looks at them."""
        return self.model.Qformer.bert.keys_values(self.image_embeds[: self.own])

    @cached_property
    def queries(self) -> tuple[Tensor, KeysValues]:
        """The contrastive pass of own images alone: states [B, queries, width], and the keys and values that the LM reads."""
        return self._look(self.keys_values)

    def itm_logits(self, image_index: Tensor, text_index: Tensor) -> Tensor:
        """[P], [P] -> [P, 2]: one pass of queries and text over the images, averaged over the queries."""
        named, index = named_images(self.image_embeds, image_index)
        images = self.keys_values if len(named) == self.own == len(self.image_embeds) else self.model.Qformer.bert.keys_values(named)
        return self.model.itm_head(self.model.query_states(images, (self.text_ids, self.text_mask), index, text_index)).mean(dim=1)

    def lm_loss(self, image_index: Tensor, text_index: Tensor) -> Tensor:
        """[P], [P] -> []: each token of a text predicted from those before it and the keys and values of its image's queries.

        Of own images the contrastive pass left them behind; each other one that is named costs a pass of its queries.
        """
        model, bert = self.model, self.model.Qformer.bert
        ids = led_by(model.tokenizer.bos_token_id, self.text_ids)
        reading = Reading.of(self.text_mask[:, 1:], model.device, text_index)  # the last token predicts none
        words = bert.embeddings(reading.take(ids[:, :-1]), reading.positions)
        states, _ = bert.follow(words, reading.tokens.texts, self._before(image_index))
        return language_modelling_loss(states, reading.take(ids[:, 1:]), model.Qformer.cls)

    def _before(self, image_index: Tensor) -> KeysValues:
        """Keys and values of the queries of each pair's image: [P, queries, width]."""
        before, device = self.queries[1], self.model.device
        others = sorted({image for image in numbers(image_index, len(self.image_embeds)) if image >= self.own})
        if others:
            images = self.image_embeds.index_select(0, on_device(others, device))
            _, more = self._look(self.model.Qformer.bert.keys_values(images))
            before = [(torch.cat([k, mk]), torch.cat([v, mv])) for (k, v), (mk, mv) in zip(before, more, strict=True)]
        place = {image: self.own + number for number, image in enumerate(others)}
        rows = [place.get(image, image) for image in numbers(image_index, len(self.image_embeds))]
        if rows == list(range(self.own + len(others))):
            return before
        index = on_device(rows, device)
        return [(keys.index_select(0, index), values.index_select(0, index)) for keys, values in before]

    def _look(self, images: KeysValues) -> tuple[Tensor, KeysValues]:
        return self.model.Qformer.bert.look(self.model.query_tokens, images)


class Blip2Mafa(MafaModel[Blip2Block], Blip2Qformer):
    """BLIP-2 stage 1 with MAFA (MAFA sections 5.5, G.7): ITC by the best query, ITM and LM by the Q-Former.

    Parameter names are LAVIS's, so a checkpoint loads into ``blip2``, ``blip2_opt``, ``blip2_image_text_matching`` and back.

    Example:
        >>> from lavis.models import load_model
        >>> model = load_model("blip2_mafa", "tiny")
    """

    visual_encoder: Any
    Qformer: Any

    not_scoring = (*MafaModel.not_scoring, "Qformer.cls")
    keeps_precision = ("visual_encoder.", "ln_vision.")  # the ViT has its own, and ln_vision normalises in fp32
    PRETRAINED_MODEL_CONFIG_DICT = {kind: str(CONFIGS / f"blip2_mafa_{kind}.yaml") for kind in ("base", "tiny")}

    def __init__(self, settings: Blip2Block) -> None:
        BaseModel.__init__(self)  # Blip2Qformer's own would download
        self.settings, self.max_txt_len = settings, settings.max_text_length
        self.tokenizer = build_blip2_tokenizer(settings.tokenizer)
        self.visual_encoder = build_eva(settings.image_encoder)
        if settings.image_encoder.freeze:
            self.visual_encoder.eval().requires_grad_(False)
            self.visual_encoder.train = disabled_train
        self.ln_vision = LayerNorm(settings.image_encoder.width)
        self.Qformer, self.query_tokens = build_qformer(settings.qformer, settings.image_encoder.width, len(self.tokenizer))
        self.vision_proj = nn.Linear(settings.qformer.width, settings.embed_dim)
        self.text_proj = nn.Linear(settings.qformer.width, settings.embed_dim)
        self.itm_head = nn.Linear(settings.qformer.width, 2)
        self.temp = nn.Parameter(torch.tensor(settings.temperature))
        last = rf"Qformer\.bert\.encoder\.layer\.{settings.qformer.layers - 1}\."
        self.trained_by = {
            PROJECTIONS: {"itc"},
            r"itm_head\.": {"itm"},
            r"Qformer\.cls\.": {"lm"},
            last + r"(intermediate|output)\.": {"itc", "lm"},  # ITM reads the queries alone
            last + r"(crossattention|intermediate_query|output_query)\.": {"itc", "itm"},  # LM reads the keys and values before them
        }
        self._prepare_mafa()

    # --- weights ---------------------------------------------------------------------------------------------------

    def own_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return fit_position_embeddings(state, self.visual_encoder)

    def _load(self, state: dict[str, Tensor], source: str, may_miss: tuple[str, ...]) -> Any:
        lacking = without_vit(state, self.settings.image_encoder, source)
        missing = super()._load(state, source, (*lacking, *may_miss))
        self.visual_encoder.as_published &= bool(lacking)
        return missing

    def unsaved_parts(self) -> tuple[str, ...]:
        """Frozen weights that come from a file of their own: checkpoints leave them out, as LAVIS's do."""
        return with_own_file(frozen_only=True, visual_encoder=self.settings.image_encoder)

    # --- rows, whose features are always fp32 since they decide what is mined --------------------------------------

    def image_states(self, image: Tensor) -> Tensor:
        return self.visual_encoder(image)

    def image_tokens(self, states: Tensor) -> Tensor:
        return self.ln_vision(states)

    def image_features(self, tokens: Tensor) -> Tensor:
        """-> [B, queries, d]"""
        bert = self.Qformer.bert
        return self._image_feature(bert.look(self.query_tokens, bert.keys_values(tokens))[0])

    def text_tokens(self, captions: list[str], gathered: bool = False) -> Texts:
        ids, mask = tokenize(self.tokenizer, captions, self.max_txt_len)
        return gather_words(ids, mask, self.tokenizer.pad_token_id, self.device) if gathered else (ids, mask)

    def text_features(self, texts: Texts) -> Tensor:
        ids, mask = texts
        reading = Reading.of(mask, self.device)
        states = self.Qformer.bert.read(ids, reading, reading.first)
        with torch.autocast(states.device.type, enabled=False):
            return F.normalize(self.text_proj(states.float()), dim=-1)

    def match_rows(self, image_tokens: Tensor, texts: Texts, image_index: Tensor, text_index: Tensor) -> Tensor:
        image_tokens, image_index = named_images(image_tokens, image_index)
        images = self.Qformer.bert.keys_values(image_tokens)
        return without_autocast(self.itm_head, self.query_states(images, texts, image_index, text_index)).mean(dim=1)

    def query_states(self, images: KeysValues, texts: Texts, image_index: Tensor, text_index: Tensor) -> Tensor:
        """Queries together with a text over an image, LongTensor[P] each: -> [P, queries, width]."""
        (ids, mask), queries = texts, self.query_tokens
        reading = together(mask, queries.shape[1], queries.device, text_index, image_index, len(images[0][0]))
        return self.Qformer.bert.match(queries, ids, reading, images)

    def _image_feature(self, query_states: Tensor) -> Tensor:
        """[B, queries, width] -> [B, queries, d]"""
        with torch.autocast(query_states.device.type, enabled=False):
            return F.normalize(self.vision_proj(query_states.float()), dim=-1)

    # --- one training step -----------------------------------------------------------------------------------------

    def encode(self, inputs: StepInputs) -> Encoded:
        """ViT, queries and texts once."""
        frozen, own = self.visual_encoder.frozen, len(inputs.captions)
        vit_states = self.image_states(inputs.image)
        ids, mask = self.text_tokens(inputs.captions, self.gathers)
        if self.gathers and frozen:  # it needs no gradient, so its states travel and every rank normalises them all: the same gradients
            vit_states = gather_own_first(vit_states)
        image_embeds = self.image_tokens(vit_states)
        if self.gathers and not frozen:
            image_embeds = gather_own_first(image_embeds, with_gradient=True)
        pairs = Blip2Pairs(self, image_embeds, ids, mask, own, vit_states if frozen else None)
        image_feature, text_feature = self._image_feature(pairs.queries[0]), self.text_features((ids[:own], mask[:own]))
        batch = self.contrast(inputs, image_feature, text_feature)
        if (synthetic := self.synthetic_texts(inputs, ids[:own], mask[:own], len(mask))) is not None:
            batch.extra, pairs.metrics = synthetic.pairs, synthetic.metrics
            pairs.text_ids, pairs.text_mask = synthetic.following(ids, mask)
        of_text = text_feature.detach()
        return Encoded(pairs, batch, (most_similar_query(image_feature.detach(), of_text), of_text))

    # --- LAVIS's interface -----------------------------------------------------------------------------------------

    def extract_features(self, samples: dict[str, Any], mode: str = "multimodal") -> Any:
        """LAVIS's, for a single text too; UserError for another mode than image, text, multimodal, or samples that lack its part."""
        needs = {"image": ("image",), "text": ("text_input",), "multimodal": ("image", "text_input")}
        if not isinstance(mode, str) or mode not in needs:
            raise UserError(f"mode is {mode!r}; allowed: {', '.join(needs)}.")
        samples = self.check_samples(samples, *needs[mode])
        longest = max((len(self.tokenizer(text).input_ids) for text in samples.get("text_input", ()) if mode != "image"), default=0)
        if longest > POSITIONS:  # LAVIS cuts no text here
            raise UserError(
                f"samples['text_input'] has a text of {longest} tokens; allowed: at most the model's {POSITIONS} positions."
            )
        return super().extract_features({k: v.to(self.device) if k == "image" else v for k, v in samples.items()}, mode)

    @torch.no_grad()
    def generate(
        self,
        samples: dict[str, Any],
        use_nucleus_sampling: bool = False,
        num_beams: int = 3,
        max_length: int = 30,
        min_length: int = 10,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
        num_captions: int = 1,
        temperature: float = 1.0,
    ) -> list[str]:
        """Captions of ``image`` [B, 3, H, W] by the Q-Former: LAVIS's, with what its BLIP-2 OPT takes besides (the last three).

        Args:
            use_nucleus_sampling: sample within ``top_p`` at ``temperature``; False searches with ``num_beams``.
            num_captions: of each image; with beams at most ``num_beams``.

        Returns:
            B x ``num_captions`` captions, those of an image one after another; UserError where the arguments do not go together.
        """
        samples = self.check_samples(samples, "image")
        check_lengths(min_length, max_length, num_beams, num_captions, use_nucleus_sampling)
        images = self.ln_vision(self.visual_encoder(samples["image"].to(self.device)))
        first = torch.full((len(images), 1), self.tokenizer.bos_token_id, device=self.device)
        how = Writing(
            longest=max(1, max_length - 1),  # LAVIS's lengths count [DEC]
            shortest=min_length - 1,
            end=self.tokenizer.sep_token_id,
            beams=num_beams,
            lines=num_captions,
            sampled=use_nucleus_sampling,
            top_p=top_p,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            length_penalty=length_penalty,
        )
        lines = write(QFormerWords(self.Qformer, self.query_tokens, images), first, how)
        return self.tokenizer.batch_decode(lines, skip_special_tokens=True)
