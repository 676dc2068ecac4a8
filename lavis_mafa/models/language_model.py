"""The OPT that stage 2 speaks through: a hub name or a local folder, or a small one from scratch that reads bytes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from lavis.models.blip2_models.modeling_opt import OPTConfig, OPTForCausalLM
from torch import nn
from transformers import AutoTokenizer, GPT2Tokenizer
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

from lavis_mafa.common.errors import UserError
from lavis_mafa.common.hub import check_kind_on_hub, from_hub, model_from_hub
from lavis_mafa.common.model_settings import LanguageModel
from lavis_mafa.models.beams import GeneratedLengths
from lavis_mafa.models.blip2_encoders import PRECISIONS

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # with OPT's ids
POSITIONS = 512
KEY, WHAT = "model.language_model.init", "a folder with OPT's weights and tokenizer"


class Opt(GeneratedLengths, OPTForCausalLM):
    """LAVIS's OPT, whose beam search does not count the prompt."""


def build_opt(settings: LanguageModel) -> tuple[Opt, Any]:
    """LAVIS's OPT (which takes query embeddings) and its tokenizer.

    ``init``: a hub name or a local folder as OPT is published; null builds one of the given sizes from scratch.

    Raises:
        UserError: neither a folder nor reachable as a hub name.
    """
    dtype = PRECISIONS[settings.precision]
    if settings.init is None:
        tokenizer = byte_tokenizer()
        return _norms_in_fp32(Opt(_config(settings, len(tokenizer))).to(dtype)), tokenizer
    tokenizer = from_hub(lambda name: AutoTokenizer.from_pretrained(name, use_fast=False), settings.init, KEY, WHAT)
    model = model_from_hub(Opt, settings.init, KEY, WHAT, "opt", may_miss=("lm_head.",), torch_dtype=dtype)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(f"{KEY} is {settings.init!r}, whose tokenizer has {len(tokenizer)} words, its model {model.config.vocab_size}.")
    return _norms_in_fp32(model), tokenizer


def check_opt(settings: LanguageModel) -> None:
    """What ``init`` names is an OPT, found from its config before anything large is loaded; raises UserError."""
    if settings.init is not None:
        check_kind_on_hub(settings.init, KEY, WHAT, "opt")


def byte_tokenizer() -> GPT2Tokenizer:
    """A tokenizer of OPT's kind whose tokens are the 256 bytes: it knows every text and needs no data.

    Example:
        >>> byte_tokenizer()("hi", add_special_tokens=False).input_ids
        [75, 76]
    """
    tokens = [*SPECIAL, *bytes_to_unicode().values()]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
        merges.write_text("#version: 0.2\n", encoding="utf-8")
        return GPT2Tokenizer(
            str(vocabulary),
            str(merges),
            unk_token="</s>",
            bos_token="</s>",
            eos_token="</s>",
            pad_token="<pad>",
            add_bos_token=True,
            model_max_length=POSITIONS,
        )


def _norms_in_fp32(model: Opt) -> Opt:
    """Norms stay in fp32 (0.1 % of the weights): a GPU computes them so anyway, and a CPU refuses mixed types."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    return model


def _config(settings: LanguageModel, vocabulary: int) -> OPTConfig:
    return OPTConfig(
        vocab_size=vocabulary,
        hidden_size=settings.width,
        word_embed_proj_dim=settings.width,
        ffn_dim=4 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=POSITIONS,
        dropout=0.0,
        bos_token_id=SPECIAL.index("</s>"),
        eos_token_id=SPECIAL.index("</s>"),
        pad_token_id=SPECIAL.index("<pad>"),
    )
