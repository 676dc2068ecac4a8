"""BLIP-2's stage 1 as a PairModel: the encoded batch, its matching logits and its LM loss by pair lists.

``blip2_mafa``: stage 1 of BLIP-2 (LAVIS's Q-Former) with MAFA's step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lavis.models.blip2_models.blip2 import LayerNorm
from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
from torch import Tensor, nn

from lavis_mafa.config.checkpoints import OF_MODEL, check_kind
from lavis_mafa.config.schema import Blip2Block
from lavis_mafa.distributed import gather_own_first
from lavis_mafa.errors import UserError
from lavis_mafa.models.base import CONFIGS, PROJECTIONS, MafaModel, check_lengths, may_lack
from lavis_mafa.models.blip2_encoders import (
    EvaVit,
    build_blip2_tokenizer,
    build_eva,
    build_qformer,
    resize_positions,
    with_own_file,
    without_vit,
)
from lavis_mafa.models.encoders import tokenize
from lavis_mafa.models.retrieval import best_query, in_fp32
from lavis_mafa.objectives import EncodedBatch, known_positives, language_modelling_loss
from lavis_mafa.weights import load_exactly, read_weights

KeysValues = tuple[tuple[Tensor, Tensor], ...]  # of each layer [B, heads, queries, d]


class Blip2Pairs:
    """K images as ViT states and K texts as ids; an index may name any of them, also those gathered from other ranks."""

    def __init__(
        self,
        model: Blip2Mafa,
        image_embeds: Tensor,  # [K, N, vision width]
        text_ids: Tensor,  # [K, T]
        text_mask: Tensor,  # [K, T]
        query_cache: KeysValues,  # of the batch's own B images
    ) -> None:
        self.model = model
        self.image_embeds, self.text_ids, self.text_mask = image_embeds, text_ids, text_mask
        self.query_cache = query_cache

    def itm_logits(self, image_index: Tensor, text_index: Tensor) -> Tensor:
        """[P], [P] -> [P, 2]: one pass of queries and text over the images, averaged over the queries."""
        model = self.model
        ids, mask = self.text_ids.index_select(0, text_index), self.text_mask.index_select(0, text_index)
        images = self.image_embeds.index_select(0, image_index)
        return match_queries(model.Qformer.bert, model.query_tokens, model.itm_head, images, ids, mask)

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
        queries = torch.ones(len(ids), model.query_tokens.shape[1], dtype=mask.dtype, device=mask.device)
        states = model.Qformer.bert(
            ids,
            attention_mask=torch.cat([queries, mask], dim=1),
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


def match_queries(bert: Any, query_tokens: Tensor, head: Any, image_embeds: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The matching head on P pairs: [P, N, vision width], [P, T], [P, T] -> [P, 2], the mean over the queries."""
    queries = query_tokens.expand(len(ids), -1, -1)
    states = bert(
        ids,
        query_embeds=queries,
        attention_mask=torch.cat([torch.ones(queries.shape[:2], dtype=mask.dtype, device=mask.device), mask], dim=1),
        encoder_hidden_states=image_embeds,
        encoder_attention_mask=torch.ones(image_embeds.shape[:2], dtype=torch.long, device=image_embeds.device),
        return_dict=True,
    ).last_hidden_state
    return head(states[:, : queries.shape[1]]).mean(dim=1)


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

    def load_from_pretrained(self, url_or_filename: str) -> Any:
        """Start from a stage-1 checkpoint of ours or LAVIS's; anything that does not fit is an error that lists the keys.

        A checkpoint without its image encoder (LAVIS and we leave a frozen one out) needs ``image_encoder.init``.
        """
        source = f"model.pretrained: {url_or_filename}"
        state = resize_positions(read_weights(url_or_filename, "model.pretrained"), self.visual_encoder)
        check_kind(state, OF_MODEL[self.settings.arch], source, self.settings.arch)
        may_miss = without_vit(state, self.settings.image_encoder, source)
        told = load_exactly(self, state, source, may_miss=(*may_miss, *may_lack(state, self.settings.arch, source)))
        self.visual_encoder.as_published &= bool(may_miss)
        return told

    def unsaved_parts(self) -> tuple[str, ...]:
        """Frozen weights that come from a file of their own: checkpoints leave them out, as LAVIS's do."""
        return with_own_file(frozen_only=True, visual_encoder=self.settings.image_encoder)

    # --- one training step -----------------------------------------------------------------------------------------

    def encode(self, samples: dict[str, Any]) -> tuple[Blip2Pairs, EncodedBatch, tuple[Tensor, Tensor]]:
        """ViT, queries and texts once: pair lists for ITM and LM, similarities of the best query, features [B, d] for GRIT.

        Writes ``vit_states`` [K, N, width] into ``samples``, for a Con-D with the same frozen ViT.
        """
        gathered = self.batch_scope == "global"
        vit_states = self.visual_encoder(samples["image"].to(self.device))
        image_embeds = self.ln_vision(vit_states)
        query_states, cache = query_pass(self, image_embeds)
        ids, mask = tokenize(self.tokenizer, samples["text_input"], self.max_txt_len, self.device, gathered)
        image_feature, text_feature = self._image_feature(query_states), self._text_feature(ids, mask)
        keys = self._keys(samples)
        all_keys, keys_image, keys_text = keys, image_feature.detach(), text_feature.detach()
        own = most_similar_query(keys_image, keys_text), keys_text
        if gathered:
            # a frozen ViT needs no gradient, so its states travel and every rank normalises them all: the same gradients
            vit_states = gather_own_first(vit_states) if self.visual_encoder.frozen else vit_states
            image_embeds = (
                self.ln_vision(vit_states) if self.visual_encoder.frozen else gather_own_first(image_embeds, with_gradient=True)
            )
            ids, mask, all_keys = gather_own_first(ids), gather_own_first(mask), gather_own_first(keys)
            keys_image, keys_text = gather_own_first(keys_image), gather_own_first(keys_text)
        if self.visual_encoder.frozen:
            samples["vit_states"] = vit_states
        batch = EncodedBatch(
            sim_i2t=best_query(image_feature, keys_text),
            sim_t2i=best_query(keys_image, text_feature).T,
            temperature=self.temp,
            known_positive=known_positives(keys, all_keys),
            candidates=len(all_keys),
        )
        return Blip2Pairs(self, image_embeds, ids, mask, cache), batch, own

    @torch.no_grad()
    def grit_features(self, samples: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Features [B, d] without a training step, for GRIT's separate pass (GRIT-VLP Table 4, "naive")."""
        _, image_feature = self.image_rows(samples["image"].to(self.device))
        _, text_feature = self.text_rows(samples["text_input"])
        return most_similar_query(image_feature, text_feature), text_feature

    # --- LAVIS's interface ---------------------------------------------------------------------------------------------

    def extract_features(self, samples: dict[str, Any], mode: str = "multimodal") -> Any:
        """LAVIS's, for a single text too.

        Raises:
            UserError: another mode than image, text, multimodal, or samples that lack what it needs.
        """
        needs = {"image": ("image",), "text": ("text_input",), "multimodal": ("image", "text_input")}
        if not isinstance(mode, str) or mode not in needs:
            raise UserError(f"mode is {mode!r}; allowed: {', '.join(needs)}.")
        samples = self.checked(samples, *needs[mode])
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
        """Captions by the Q-Former: LAVIS's, with what its BLIP-2 OPT takes besides (the last three).

        Args:
            samples: ``image`` [B, 3, H, W].
            use_nucleus_sampling: sample within ``top_p`` at ``temperature``; False searches with ``num_beams``.
            num_captions: of each image; with beams at most ``num_beams``.

        Returns:
            B x ``num_captions`` captions, those of an image one after another.

        Raises:
            UserError: no images of the model's size, or lengths, beams or numbers of captions that do not go together.
        """
        samples = self.checked(samples, "image")
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

    # --- retrieval -------------------------------------------------------------------------------------------------

    def text_rows(self, captions: list[str]) -> tuple[tuple[Tensor, Tensor], Tensor]:
        ids, mask = tokenize(self.tokenizer, captions, self.max_txt_len, self.device)
        return (ids, mask), self._text_feature(ids, mask)

    def image_rows(self, image: Tensor) -> tuple[Tensor, Tensor]:
        image_embeds = self.ln_vision(self.visual_encoder(image))
        return image_embeds, self._image_feature(query_pass(self, image_embeds)[0])

    def match_rows(self, image_states: Tensor, text: tuple[Tensor, ...]) -> Tensor:
        head = partial(in_fp32, self.itm_head)
        return match_queries(self.Qformer.bert, self.query_tokens, head, image_states, *text)

    # --- features, always fp32 since they decide what is mined ---------------------------------------------------------

    def _image_feature(self, query_states: Tensor) -> Tensor:
        """[B, queries, width] -> [B, queries, d]"""
        with torch.autocast(query_states.device.type, enabled=False):
            return F.normalize(self.vision_proj(query_states.float()), dim=-1)

    def _text_feature(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, T], [B, T] -> [B, d]"""
        states = self.Qformer.bert(ids, attention_mask=mask, return_dict=True).last_hidden_state[:, 0]
        with torch.autocast(states.device.type, enabled=False):
            return F.normalize(self.text_proj(states.float()), dim=-1)


def most_similar_query(image_feature: Tensor, text_feature: Tensor) -> Tensor:
    """Per image the query most similar to its own text (MAFA section G.7): [B, queries, d], [B, d] -> [B, d]."""
    best = torch.einsum("bqd,bd->bq", image_feature, text_feature).argmax(dim=1)
    return image_feature[torch.arange(len(best), device=best.device), best]
