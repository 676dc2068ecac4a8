"""``blip2_mafa``: stage 1 of BLIP-2 (LAVIS's Q-Former) with MAFA's step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lavis.models.blip2_models.blip2 import LayerNorm
from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
from torch import Tensor, nn

from lavis_mafa.config.schema import Blip2Block
from lavis_mafa.distributed import gather_own_first
from lavis_mafa.errors import UserError
from lavis_mafa.models.base import CONFIGS, PROJECTIONS, MafaModel, Texts
from lavis_mafa.models.encoders import (
    build_blip2_tokenizer,
    build_eva,
    build_qformer,
    tokenize,
    with_own_file,
    without_vit,
)
from lavis_mafa.models.retrieval import most_similar_query, without_autocast
from lavis_mafa.models.step import Encoded, StepInputs, check_lengths
from lavis_mafa.models.vit import EvaVit, fit_position_embeddings
from lavis_mafa.objectives import language_modelling_loss

KeysValues = tuple[tuple[Tensor, Tensor], ...]  # of each layer [B, heads, queries, d]


@dataclass
class Blip2Pairs:
    """K images as ViT states and K texts as ids; an index may name any of them, also those gathered from other ranks."""

    model: Blip2Mafa
    image_embeds: Tensor  # [K, N, vision width]
    text_ids: Tensor  # [K, T]
    text_mask: Tensor  # [K, T]
    query_cache: KeysValues  # of the batch's own B images
    vit_states: Tensor | None = None  # [K, N, vision width] before ln_vision, of a frozen ViT: a Con-D may have the same one

    def itm_logits(self, image_index: Tensor, text_index: Tensor) -> Tensor:
        """[P], [P] -> [P, 2]: one pass of queries and text over the images, averaged over the queries."""
        model = self.model
        ids, mask = self.text_ids.index_select(0, text_index), self.text_mask.index_select(0, text_index)
        return model.itm_head(model.query_states(self.image_embeds.index_select(0, image_index), ids, mask)).mean(dim=1)

    def lm_loss(self, image_index: Tensor, text_index: Tensor) -> Tensor:
        """[P], [P] -> []: each text predicted from its image's query keys and values, which the contrastive pass left behind.

        The first B pairs must name own images; further ones may name any, and cost a pass of their queries.
        """
        model, own = self.model, len(self.query_cache[0][0])
        cache = tuple((k.index_select(0, image_index[:own]), v.index_select(0, image_index[:own])) for k, v in self.query_cache)
        if len(image_index) > own:
            _, more = query_pass(model, self.image_embeds.index_select(0, image_index[own:]))
            cache = tuple((torch.cat([k, mk]), torch.cat([v, mv])) for (k, v), (mk, mv) in zip(cache, more, strict=True))
        ids = self.text_ids.index_select(0, text_index).clone()
        ids[:, 0] = model.tokenizer.bos_token_id
        mask = self.text_mask.index_select(0, text_index)
        states = model.Qformer.bert(
            ids,
            attention_mask=torch.cat([_ones(mask, len(ids), model.query_tokens.shape[1]), mask], dim=1),
            past_key_values=cache,
            return_dict=True,
            is_decoder=True,
        ).last_hidden_state
        return language_modelling_loss(states, ids, model.Qformer.cls, model.tokenizer.pad_token_id)


def query_pass(model: Any, image_embeds: Tensor) -> tuple[Tensor, KeysValues]:
    """The queries alone over B images: states [B, queries, width], and the keys and values that the LM reads."""
    output = model.Qformer.bert(
        query_embeds=model.query_tokens.expand(len(image_embeds), -1, -1),
        encoder_hidden_states=image_embeds,
        encoder_attention_mask=torch.ones(image_embeds.shape[:2], dtype=torch.long, device=image_embeds.device),
        use_cache=True,
        return_dict=True,
    )
    return output.last_hidden_state, output.past_key_values


def _ones(like: Tensor, *shape: int) -> Tensor:
    return torch.ones(*shape, dtype=like.dtype, device=like.device)


class Blip2Mafa(MafaModel[Blip2Block], Blip2Qformer):
    """BLIP-2 stage 1 with MAFA (MAFA sections 5.5, G.7): ITC by the best query, ITM and LM by the Q-Former.

    Parameter names are LAVIS's, so a checkpoint loads into ``blip2``, ``blip2_opt``, ``blip2_image_text_matching`` and back.

    Example:
        >>> from lavis.models import load_model
        >>> model = load_model("blip2_mafa", "tiny")
    """

    # LAVIS fills these, untyped
    tokenizer: Any
    visual_encoder: EvaVit
    ln_vision: Any
    Qformer: Any
    query_tokens: Any
    vision_proj: Any
    text_proj: Any
    itm_head: Any
    max_txt_len: int

    not_scoring = (*MafaModel.not_scoring, "Qformer.cls")
    keeps_precision = ("visual_encoder.", "ln_vision.")  # the ViT has its own, and ln_vision normalises in fp32
    PRETRAINED_MODEL_CONFIG_DICT = {kind: str(CONFIGS / f"blip2_mafa_{kind}.yaml") for kind in ("base", "tiny")}

    def __init__(self, settings: Blip2Block) -> None:
        self.settings = settings  # first: LAVIS's __init__ asks the three methods below
        Blip2Qformer.__init__(
            self,
            img_size=settings.image_encoder.image_size,
            freeze_vit=settings.image_encoder.freeze,
            num_query_token=settings.qformer.queries,
            cross_attention_freq=settings.qformer.cross_attention_every,
            embed_dim=settings.embed_dim,
            max_txt_len=settings.max_text_length,
        )
        nn.init.constant_(self.temp, settings.temperature)
        last = rf"Qformer\.bert\.encoder\.layer\.{settings.qformer.layers - 1}\."
        self.trained_by = {
            PROJECTIONS: {"itc"},
            r"itm_head\.": {"itm"},
            r"Qformer\.cls\.": {"lm"},
            last + r"(crossattention|intermediate_query|output_query)\.": {"itc", "itm"},  # LM reads the keys and values before them
        }
        self._prepare_mafa()

    # --- where LAVIS would download at fixed sizes -----------------------------------------------------------------

    def init_tokenizer(self) -> Any:
        return build_blip2_tokenizer(self.settings.tokenizer)

    def init_vision_encoder(self, *_: Any, **__: Any) -> tuple[EvaVit, LayerNorm]:
        encoder = build_eva(self.settings.image_encoder)
        return encoder, LayerNorm(encoder.num_features)

    def init_Qformer(self, _: int, vision_width: int, *__: Any) -> Any:  # noqa: N802 - LAVIS's name
        return build_qformer(self.settings.qformer, vision_width, len(self.tokenizer))

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
        return self._image_feature(query_pass(self, tokens)[0])

    def text_tokens(self, captions: list[str], gathered: bool = False) -> Texts:
        return tokenize(self.tokenizer, captions, self.max_txt_len, self.device, gathered)

    def text_features(self, texts: Texts) -> Tensor:
        ids, mask = texts
        states = self.Qformer.bert(ids, attention_mask=mask, return_dict=True).last_hidden_state[:, 0]
        with torch.autocast(states.device.type, enabled=False):
            return F.normalize(self.text_proj(states.float()), dim=-1)

    def match_rows(self, image_tokens: Tensor, texts: Texts) -> Tensor:
        return without_autocast(self.itm_head, self.query_states(image_tokens, *texts)).mean(dim=1)

    def query_states(self, image_embeds: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Queries and text of P pairs over their images: [P, N, vision width], [P, T], [P, T] -> [P, queries, width]."""
        queries = self.query_tokens.expand(len(ids), -1, -1)
        states = self.Qformer.bert(
            ids,
            query_embeds=queries,
            attention_mask=torch.cat([_ones(mask, *queries.shape[:2]), mask], dim=1),
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=torch.ones(image_embeds.shape[:2], dtype=torch.long, device=image_embeds.device),
            return_dict=True,
        ).last_hidden_state
        return states[:, : queries.shape[1]]

    def _image_feature(self, query_states: Tensor) -> Tensor:
        """[B, queries, width] -> [B, queries, d]"""
        with torch.autocast(query_states.device.type, enabled=False):
            return F.normalize(self.vision_proj(query_states.float()), dim=-1)

    # --- one training step -----------------------------------------------------------------------------------------

    def encode(self, inputs: StepInputs) -> Encoded:
        """ViT, queries and texts once."""
        frozen = self.visual_encoder.frozen
        vit_states = self.image_states(inputs.image)
        image_embeds = self.image_tokens(vit_states)
        query_states, cache = query_pass(self, image_embeds)
        ids, mask = self.text_tokens(inputs.captions, self.gathers)
        image_feature, text_feature = self._image_feature(query_states), self.text_features((ids, mask))
        batch = self.contrast(inputs, image_feature, text_feature)
        if self.gathers:
            # a frozen ViT needs no gradient, so its states travel and every rank normalises them all: the same gradients
            vit_states = gather_own_first(vit_states) if frozen else vit_states
            image_embeds = self.image_tokens(vit_states) if frozen else gather_own_first(image_embeds, with_gradient=True)
            ids, mask = gather_own_first(ids), gather_own_first(mask)
        pairs = Blip2Pairs(self, image_embeds, ids, mask, cache, vit_states if frozen else None)
        of_text = text_feature.detach()
        return Encoded(pairs, batch, (most_similar_query(image_feature.detach(), of_text), of_text))

    # --- LAVIS's interface -----------------------------------------------------------------------------------------

    def extract_features(self, samples: dict[str, Any], mode: str = "multimodal") -> Any:
        """LAVIS's, for a single text too; UserError for another mode than image, text, multimodal, or samples that lack its part."""
        needs = {"image": ("image",), "text": ("text_input",), "multimodal": ("image", "text_input")}
        if not isinstance(mode, str) or mode not in needs:
            raise UserError(f"mode is {mode!r}; allowed: {', '.join(needs)}.")
        samples = self.check_samples(samples, *needs[mode])
        positions = self.Qformer.config.max_position_embeddings  # LAVIS cuts no text here
        longest = max((len(self.tokenizer(text).input_ids) for text in samples.get("text_input", ()) if mode != "image"), default=0)
        if longest > positions:
            raise UserError(
                f"samples['text_input'] has a text of {longest} tokens; allowed: at most the model's {positions} positions."
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
        # transformers expands the ids alone to beams and samples
        images = images.repeat_interleave(num_captions if use_nucleus_sampling else num_beams, dim=0)
        outputs = self.Qformer.generate(
            input_ids=torch.full((len(samples["image"]), 1), self.tokenizer.bos_token_id, device=self.device),
            query_embeds=self.query_tokens.expand(len(images), -1, -1),
            encoder_hidden_states=images,
            encoder_attention_mask=torch.ones(images.shape[:2], dtype=torch.long, device=self.device),
            max_length=max_length,
            min_length=min_length,
            num_beams=1 if use_nucleus_sampling else num_beams,
            do_sample=use_nucleus_sampling,
            top_p=top_p,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            length_penalty=length_penalty,
            num_return_sequences=num_captions,
            eos_token_id=self.tokenizer.sep_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return self.tokenizer.batch_decode(outputs, skip_special_tokens=True)
