"""A YAML's model and Con-D at their real sizes, without their weights' memory, files or downloads."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from lavis.models.blip2_models.modeling_opt import OPTConfig, OPTForCausalLM
from torch import nn

from lavis_mafa.config.schema import FAMILIES, LanguageModel, con_d_block
from lavis_mafa.errors import UserError
from lavis_mafa.models.albef import AlbefMafa
from lavis_mafa.models.blip import BlipMafa
from lavis_mafa.models.blip2 import Blip2Mafa
from lavis_mafa.models.blip2_encoders import PRECISIONS, build_eva
from lavis_mafa.models.blip2_opt import Blip2OptMafa, build_opt, byte_tokenizer
from lavis_mafa.models.con_d import AlbefDiscriminator, Blip2Discriminator, BlipDiscriminator

MODELS: dict[str, Any] = {"albef_mafa": AlbefMafa, "blip_mafa": BlipMafa, "blip2_mafa": Blip2Mafa, "blip2_opt_mafa": Blip2OptMafa}
CON_DS: dict[str, Any] = {"albef_mafa": AlbefDiscriminator, "blip_mafa": BlipDiscriminator, "blip2_mafa": Blip2Discriminator}
# width, layers, heads as released, all with 50,272 words (OPT, Table 1); 350m is built differently
OPT = {"125m": (768, 12, 12), "1.3b": (2048, 24, 32), "2.7b": (2560, 32, 32), "6.7b": (4096, 32, 32), "13b": (5120, 40, 40)}
BERT_WORDS = 30522


def without_files(settings: Any) -> Any:
    """The same sizes with nothing that would be read or downloaded, except a tokenizer that is a local file."""
    parts: dict[str, Any] = {"pretrained": None}
    for name in ("image_encoder", "text_encoder", "qformer", "language_model"):
        if hasattr(settings, name):
            parts[name] = replace(getattr(settings, name), init=None)
    if hasattr(settings, "stage_1"):
        parts["stage_1"] = None
    return replace(settings, **parts)


def build(settings: Any) -> Any:
    """The model of a typed ``model:`` block on the default device, from scratch, in training mode.

    Raises:
        UserError: a language model whose size is neither in the table nor in a local folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        plain = _with_tokenizer(without_files(settings), folder)
        with patch("torch.linspace", np.linspace):  # LAVIS reads drop-path rates out of a tensor, which the meta device cannot give
            if settings.arch != "blip2_opt_mafa":
                return MODELS[settings.arch](plain).train()
            words = patch("lavis_mafa.models.blip2_opt.build_opt", lambda _: _opt(settings.language_model))
            with words, patch.object(torch.Tensor, "__int__", lambda _: 1):  # the prompt's length
                return Blip2OptMafa(plain).train()


def build_con_d(settings: Any, own_vit: bool = False) -> Any:
    """The discriminator that a ``model:`` block names, untrained, on the default device; None where there is none to compute.

    Args:
        settings: the model's block.
        own_vit: give a BLIP-2 Con-D a ViT of its own though it could share the model's frozen one.
    """
    if not hasattr(settings, "ecm") or not settings.ecm.enabled or settings.discriminator.arch == "ground_truth":
        return None
    family = FAMILIES[settings.discriminator.arch]
    with tempfile.TemporaryDirectory() as folder:
        block = _with_tokenizer(without_files(con_d_block(settings)), folder)
        shared = can_share(settings) and not own_vit
        more = {"shared": shared} if family == "blip2_mafa" else {}
        with patch("torch.linspace", np.linspace):
            con_d = CON_DS[family](block, settings.discriminator.precision, **more)
            if family == "blip2_mafa" and not shared:
                con_d.visual_encoder = build_eva(replace(block.image_encoder, freeze=True)).eval().requires_grad_(False)
    con_d.network.eval().requires_grad_(False).to(con_d.dtype)
    if family == "blip2_mafa":
        con_d.network.ln_vision.float()
    return con_d


def can_share(settings: Any) -> bool:
    """Could Con-D use the model's frozen ViT? (It does where the weights are equal too.)"""
    con_d = getattr(settings, "discriminator", None)
    if con_d is None or settings.arch != "blip2_mafa" or FAMILIES.get(con_d.arch) != "blip2_mafa" or not settings.image_encoder.freeze:
        return False
    own, theirs = settings.image_encoder, con_d_block(settings).image_encoder
    return (own.width, own.depth, own.patch_size) == (theirs.width, theirs.depth, theirs.patch_size)


def opt_config(init: str) -> OPTConfig:
    """Of a local folder, or of a size that is known offline; raises UserError."""
    if Path(init).is_dir():
        return OPTConfig.from_pretrained(init)
    kind = init.lower().rsplit("opt-", 1)[-1]
    if kind not in OPT:
        raise UserError(
            f"model.language_model.init is {init!r}, whose size is not known; known: a local folder, opt-{', opt-'.join(OPT)}."
        )
    width, layers, heads = OPT[kind]
    sizes = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width}
    return OPTConfig(num_hidden_layers=layers, num_attention_heads=heads, **sizes)


def _opt(settings: LanguageModel) -> tuple[OPTForCausalLM, Any]:
    """As build_opt, from scratch at the size of what it would download."""
    if settings.init is None:
        return build_opt(settings)
    model = OPTForCausalLM(opt_config(settings.init)).to(PRECISIONS[settings.precision])
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    return model, byte_tokenizer()


def _with_tokenizer(settings: Any, folder: str) -> Any:
    """A vocabulary of BERT's size where the block names a hub's or a package's: only its length matters."""
    if not hasattr(settings, "tokenizer") or Path(settings.tokenizer).exists():
        return settings
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1037: "a"}
    path = Path(folder) / "vocab.txt"
    path.write_text("\n".join(special.get(i, f"word{i}") for i in range(BERT_WORDS)), encoding="utf-8")
    return replace(settings, tokenizer=str(path))
