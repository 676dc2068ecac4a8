"""Weights by transformers' names (BLIP, BLIP-2, ViT) -> by LAVIS's. The tensors are the same, except that q, k and v may be apart."""

from __future__ import annotations

import torch
from torch import Tensor

State = dict[str, Tensor]
VISION = {  # of BLIP and BLIP-2, after `vision_model.`
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding.": "patch_embed.proj.",
    "encoder.layers.": "blocks.",
    ".layer_norm1.": ".norm1.",
    ".layer_norm2.": ".norm2.",
    ".self_attn.projection.": ".attn.proj.",
    ".self_attn.": ".attn.",
}
VIT = {  # of ViT and DeiT
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "encoder.layer.": "blocks.",
    ".layernorm_before.": ".norm1.",
    ".layernorm_after.": ".norm2.",
    ".attention.output.dense.": ".attn.proj.",
    ".intermediate.dense.": ".mlp.fc1.",
    ".output.dense.": ".mlp.fc2.",
}
QFORMER = {
    "qformer.layernorm.": "Qformer.bert.embeddings.LayerNorm.",
    "embeddings.word_embeddings.": "Qformer.bert.embeddings.word_embeddings.",
    "embeddings.position_embeddings.": "Qformer.bert.embeddings.position_embeddings.",
    "vision_projection.": "vision_proj.",
    "text_projection.": "text_proj.",
    "vision_model.post_layernorm.": "ln_vision.",
}
LANGUAGE = {  # how the names of a language model begin -> LAVIS's name of it
    "language_model.model.decoder.": "opt",
    "language_model.encoder.": "t5",
    "language_model.model.layers.": "llm",
}


def lavis_names(state: State) -> State:
    """A state dict of transformers' BLIP, BLIP-2, ViT or DeiT by LAVIS's names; any other as it is."""
    if any(name.startswith("vision_model.encoder.layers.0.self_attn.") for name in state):
        blip2 = "query_tokens" in state
        if blip2 or any(name.startswith(("text_encoder.", "text_decoder.")) for name in state):
            return _of_blip2(state) if blip2 else {_in_vision(name): value for name, value in state.items()}
    key = "encoder.layer.0.attention.attention.query.weight"
    if prefix := next((name.removesuffix(key) or "." for name in state if name.endswith(key) and "qformer" not in name), None):
        return _of_vit(state, prefix.lstrip("."))
    return state


def _in_vision(name: str) -> str:
    if not name.startswith("vision_model."):
        return name
    name = name.removeprefix("vision_model.").replace("post_layernorm.", "norm.")
    return "visual_encoder." + _replaced(name, VISION)


def _replaced(name: str, names: dict[str, str]) -> str:
    for theirs, ours in names.items():
        name = name.replace(theirs, ours)
    return name


def _of_blip2(state: State) -> State:
    language = next((ours for theirs, ours in LANGUAGE.items() if any(name.startswith(theirs) for name in state)), None)
    renamed: State = {}
    for name, value in state.items():
        if start := next((start for start in QFORMER if name.startswith(start)), None):
            name = name.replace(start, QFORMER[start], 1)
        elif name.startswith("qformer."):
            name = name.replace("qformer.", "Qformer.bert.", 1).replace("attention.attention.", "attention.self.")
        elif language and name.startswith(("language_projection.", "language_model.")):
            name = name.replace("language_projection.", f"{language}_proj.").replace("language_model.", f"{language}_model.", 1)
        name = _in_vision(name)
        if name.endswith(".attn.qkv.bias"):
            # EVA's keys have no bias, and one would be the same summand in all scores of a query, which softmax ignores
            query, _, of_value = value.chunk(3)
            renamed |= {name.replace("qkv.bias", "q_bias"): query.clone(), name.replace("qkv.bias", "v_bias"): of_value.clone()}
        else:
            renamed[name] = value
    return renamed


def _of_vit(state: State, prefix: str) -> State:
    renamed: State = {}
    for name, value in state.items():
        short = name.removeprefix(prefix)
        if ".attention.attention.query." in name:
            parts = [state[name.replace("query", part)] for part in ("query", "key", "value") if name.replace("query", part) in state]
            short = short.replace(".attention.attention.query.", ".attn.qkv.")
            renamed[_replaced(short, VIT)] = torch.cat(parts)
        elif ".attention.attention." not in name:
            short = short.replace("layernorm.", "norm.", 1) if short.startswith("layernorm.") else short
            renamed[_replaced(short, VIT)] = value
    return renamed
