"""BLIP-2 by the names and sizes of transformers, from 4.27 on for its second stage and from 4.46 on for its first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lavis_mafa.models.transformer import POSITIONS
from lavis_mafa.models.vit import EPSILON
from lavis_mafa.tools.export import hf_names
from lavis_mafa.weights import QFORMER

OF_OPT = {"opt_proj.": "language_projection.", "opt_model.": "language_model."}
OF_QFORMER = {ours: theirs for theirs, ours in QFORMER.items()} | {"Qformer.bert.": "qformer."}


def blip2_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A BLIP-2 of ours by the names of transformers: :func:`lavis_mafa.weights.lavis_names` read backwards.

    Keys of EVA's attention have no bias; there it is a part of one, of zeros. What transformers lacks (the head that writes captions
    in stage 1, the temperature) keeps its name.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith(".attn.v_bias"):
            continue
        if name.endswith(".attn.q_bias"):
            of_value = state[name.replace("q_bias", "v_bias")]
            name, value = name.replace("q_bias", "qkv.bias"), torch.cat([value, torch.zeros_like(value), of_value])
        for ours, theirs in (OF_QFORMER | OF_OPT).items():
            if name.startswith(ours):
                name = name.replace(ours, theirs, 1)
                break
        if name.startswith("qformer."):
            name = name.replace("attention.self.", "attention.attention.")
        found[name] = value
    return hf_names(found)


def blip2_config(model: Any) -> dict[str, Any]:
    """Its ``config.json`` there: of ``Blip2ForConditionalGeneration``, or of a stage 1 of ``Blip2ForImageTextRetrieval``."""
    settings, vit = model.settings, model.settings.image_encoder
    vision = {
        "hidden_size": vit.width,
        "intermediate_size": len(model.visual_encoder.blocks[0].mlp.fc1.weight),
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.heads,
        "image_size": vit.image_size,
        "patch_size": vit.patch_size,
        "layer_norm_eps": EPSILON,
    }
    qformer = {
        "hidden_size": settings.qformer.width,
        "intermediate_size": len(model.Qformer.bert.encoder.layer[0].intermediate_query.dense.weight),
        "num_hidden_layers": settings.qformer.layers,
        "num_attention_heads": settings.qformer.heads,
        "max_position_embeddings": POSITIONS,
        "cross_attention_frequency": settings.qformer.cross_attention_every,
        "encoder_hidden_size": vit.width,
    }
    config = {"model_type": "blip-2", "vision_config": vision, "qformer_config": qformer, "num_query_tokens": settings.qformer.queries}
    if settings.arch == "blip2_mafa":
        qformer |= {"vocab_size": len(model.tokenizer), "use_qformer_text_input": True}
        return {**config, "architectures": ["Blip2ForImageTextRetrieval"], "image_text_hidden_size": settings.embed_dim}
    text = model.opt_model.config
    # newer versions want a token in whose places an image's queries are put: one that no text has
    words = model.opt_tokenizer
    place = len(words) if len(words) < text.vocab_size else words.convert_tokens_to_ids("<unk>")
    of_text = {**text.to_diff_dict(), "model_type": "opt"}
    return {**config, "architectures": ["Blip2ForConditionalGeneration"], "text_config": of_text, "image_token_index": place}
