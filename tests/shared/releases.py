"""Checkpoints with exactly the names that published files have, at the reduced sizes.

They are made of LAVIS's classes, which have the names of ALBEF's, GRIT-VLP's, MAFA's, TCL's and BLIP's code, and of what that code has
beside them: token types, another name of the queue's pointer, and what its trainer saves along.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import lavis_downstream
import reduced
import reduced_blip
import reduced_blip2
from lavis_mafa.models.albef_nlvr import doubled_weights
from lavis_mafa.models.albef_vqa import decoder_of
from lavis_mafa.tools.export import hf_names, plain

State = dict[str, Tensor]


def by_the_authors(state: State, **more: Any) -> dict[str, Any]:
    """BERT with token types, and a trainer's file."""
    kinds, state = torch.randn(2, reduced.WIDTH, generator=torch.Generator().manual_seed(3)), dict(state)
    for name in [name for name in state if name.endswith("embeddings.position_embeddings.weight")]:
        state[name] = state[name] - kinds[0]
        state[name.replace("position_embeddings", "token_type_embeddings")] = kinds
    beside = {"optimizer": {"state": {}, "param_groups": []}, "lr_scheduler": {}, "config": {"image_res": 256}, "epoch": 29}
    return {"model": {**state, **more}, **beside}


def without(state: State, *parts: str) -> State:
    return {name: value for name, value in state.items() if not name.startswith(parts)}


def of_retrieval(state: State) -> State:
    """The authors call the queue's pointer otherwise there."""
    return {("ptr_queue" if name == "queue_ptr" else name): value for name, value in state.items()}


def _heads(classes: int) -> State:
    width = reduced.WIDTH
    shapes = {"0.weight": (width, width), "0.bias": (width,), "2.weight": (classes, width), "2.bias": (classes,)}
    return {f"{head}.{name}": torch.zeros(shape) for head in ("cls_head", "cls_head_m") for name, shape in shapes.items()}


def _albef() -> State:
    return reduced.lavis_pretrain(5).state_dict()


def _vqa() -> State:
    state = {**plain(_albef()), **decoder_of(_albef(), reduced.FUSION)}
    state = without(state, "text_encoder.cls", "vision_proj", "text_proj", "itm_head", "temp")
    return {**state, **{re.sub(r"^(\w+)\.", r"\1_m.", name): value for name, value in state.items()}}


def _nlvr(*left_out: str) -> State:
    return without(doubled_weights(plain(_albef()), reduced.FUSION), "text_encoder.cls", "itm_head", *left_out)


def _ta() -> State:
    return {**_nlvr(), "ta_head.weight": torch.zeros(3, reduced.WIDTH), "ta_head.bias": torch.zeros(3)}


def hf_blip2(state: State) -> State:
    """LAVIS's BLIP-2 as transformers' conversion renames it: ``Blip2ForImageTextRetrieval``."""
    pairs = [
        (r"^ln_vision\.", "vision_model.post_layernorm."),
        (r"^visual_encoder\.cls_token", "vision_model.embeddings.class_embedding"),
        (r"^visual_encoder\.pos_embed", "vision_model.embeddings.position_embedding"),
        (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
        (r"^visual_encoder\.blocks\.(\d+)\.norm(\d)\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
        (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
        (r"^visual_encoder\.blocks\.(\d+)\.attn\.", r"vision_model.encoder.layers.\1.self_attn."),
        (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
        (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
        (r"^Qformer\.bert\.embeddings\.(word|position)_embeddings\.", r"embeddings.\1_embeddings."),
        (r"^Qformer\.bert\.", "qformer."),
        (r"attention\.self\.", "attention.attention."),
        (r"^vision_proj\.", "vision_projection."),
        (r"^text_proj\.", "text_projection."),
        (r"^opt_proj\.", "language_projection."),
        (r"^opt_model\.", "language_model."),
    ]
    renamed: State = {}
    for name, value in state.items():
        for pattern, theirs in pairs:
            name = re.sub(pattern, theirs, name)
        renamed[name] = value
    for name in [n for n in renamed if n.endswith("self_attn.q_bias")]:
        query, of_value = renamed.pop(name), renamed.pop(name.replace("q_bias", "v_bias"))
        renamed[name.replace("q_bias", "qkv.bias")] = torch.cat([query, torch.zeros_like(query), of_value])
    return renamed


def _blip2_itm() -> State:
    state = without(hf_blip2(reduced_blip2.ours(5).state_dict()), "Qformer.cls", "temp")
    return {name: value for name, value in state.items() if "position_ids" not in name}


Content = dict[str, Any]


def _pretraining() -> Content:
    return by_the_authors(_albef())


def _of_mafa() -> Content:
    return by_the_authors(_albef(), idx_queue=torch.full((1, 8), -100.0))


def _retrieval() -> Content:
    return by_the_authors(of_retrieval(reduced.lavis_retrieval(5).state_dict()))


def _two_images() -> State:
    return {**_nlvr("vision_proj", "text_proj", "temp"), **_heads(2)}


def _pretraining_of_blip() -> Content:
    return {"model": reduced_blip.lavis_pretrain(5).state_dict()}


# as docs/downstream.md names them -> what the file holds
RELEASES: dict[str, Callable[[], Content]] = {
    "ALBEF.pth": _pretraining,
    "ALBEF_4M.pth": _pretraining,
    "TCL_4M.pth": _pretraining,
    "checkpoint_19.pth": _of_mafa,
    "mscoco.pth": _retrieval,
    "flickr30k.pth": _retrieval,
    "refcoco.pth": _retrieval,
    "albef_coco_retrieval_lavis.pt": lambda: {"model": reduced.lavis_retrieval(5).state_dict()},
    "albef_snli_ve_lavis.pt": lambda: {"model": lavis_downstream.albef_classification(5).state_dict()},
    "vqa.pth": lambda: by_the_authors(_vqa()),
    "albef_vqav2_lavis.pt": lambda: {"model": _vqa()},
    "nlvr.pth": lambda: by_the_authors(_two_images()),
    "albef_nlvr_lavis.pt": lambda: {"model": _two_images()},
    "pretrain_model_nlvr.pth": lambda: by_the_authors(_ta()),
    "model_base.pth": _pretraining_of_blip,
    "model_base_capfilt_large.pth": _pretraining_of_blip,
    "model_base_retrieval_coco.pth": lambda: {"model": of_retrieval(reduced_blip.lavis_retrieval(5).state_dict())},
    "model_base_vqa_capfilt_large.pth": lambda: {"model": lavis_downstream.blip_vqa(5).state_dict()},
    "model_base_nlvr.pth": lambda: {"model": lavis_downstream.blip_nlvr(5).state_dict()},
    "model_base_caption_capfilt_large.pth": lambda: {"model": reduced_blip.lavis_caption(5).state_dict()},
    "model_large.pth": lambda: {"model": reduced_blip.ours(5, image_encoder={"depth": 3, "width": 64}).state_dict()},
    "blip-itm-base-coco": lambda: hf_names(without(plain(reduced_blip.lavis_retrieval(5).state_dict()), "temp")),
    "blip2_pretrained.pth": lambda: {"model": without(reduced_blip2.lavis_stage_1(5).state_dict(), "visual_encoder")},
    "blip2-itm-vit-g": _blip2_itm,
}


def write(name: str, folder: Path) -> Path:
    """The file, or the folder with ``model.safetensors`` that a name of the hub stands for."""
    content = RELEASES[name]()
    if name.endswith((".pth", ".pt")):
        torch.save(content, folder / name)
        return folder / name
    save_file({key: value.clone().contiguous() for key, value in content.items()}, folder / "model.safetensors")
    return folder
