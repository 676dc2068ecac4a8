"""Con-D for an offline pass: one of our models, whose every part that scores comes from a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from lavis.common.registry import registry
from torch import Tensor

from lavis_mafa.config.checkpoints import ALBEF, BLIP, STAGE_1, kind_of
from lavis_mafa.config.schema import MafaBlock
from lavis_mafa.errors import UserError
from lavis_mafa.models.bert import fold_token_type, with_bert
from lavis_mafa.models.blip2_encoders import resize_positions
from lavis_mafa.models.encoders import fit_position_embeddings
from lavis_mafa.models.momentum import TEACHERS
from lavis_mafa.weights import load_exactly, read_weights

KINDS = {"albef_mafa": ALBEF, "blip_mafa": BLIP, "blip2_mafa": STAGE_1}
LANGUAGE = ("text_encoder.cls.", "text_encoder.pooler.", "text_encoder.bert.pooler.", "text_decoder.", "Qformer.cls.")
NOT_SCORING = (*LANGUAGE, *TEACHERS, "temp")  # mining takes raw cosines
PROJECTIONS = ("vision_proj.", "text_proj.")
VIT = "visual_encoder."


def load_con_d(block: Any, path: str, device: torch.device, flag: str = "--con-d", mines: bool = True) -> Any:
    """The model of a YAML's ``model:`` block with the weights of ``path``: in eval mode, without gradients.

    What does not score (language-model heads and decoders, a momentum teacher, queues, the temperature) may be missing from the
    checkpoint or left over in it; all else must fit exactly.

    Args:
        block: a typed block of albef_mafa, blip_mafa or blip2_mafa. Its encoders' ``init`` is not read, except for the frozen image
            encoder that a BLIP-2 checkpoint leaves out.
        path: a checkpoint of ours or LAVIS's (pre-training, retrieval, image-text matching).
        device: where it shall work.
        flag: what named the file.
        mines: are its features used; if not, its projections need not fit either.

    Raises:
        UserError: the file is missing, is of another kind, has no matching head, or does not fit (the message lists the keys).
    """
    state = read_weights(path, flag)
    kind = kind_of({name: list(value.shape) for name, value in state.items()})
    if kind is not None and kind != KINDS[block.arch]:
        raise UserError(f"{flag}: {path} is {kind}, but model.arch {block.arch} needs {KINDS[block.arch]}.")
    if not any(name.startswith("itm_head.") for name in state):
        raise UserError(
            f"{flag}: {path} has no matching head (itm_head), so it cannot judge pairs; give a checkpoint of pre-training, "
            "retrieval or image-text matching."
        )
    stored_vit = any(name.startswith(VIT) for name in state)
    if not stored_vit and block.arch == "blip2_mafa" and block.image_encoder.init is None:
        raise UserError(f"{flag}: {path} holds no image encoder; name its file in model.image_encoder.init.")
    model = registry.get_model_class(block.arch)(_plain(block, stored_vit or block.arch != "blip2_mafa"))
    if block.arch == "blip2_mafa":
        state = resize_positions(state, model.visual_encoder)
    else:
        state = fold_token_type(with_bert(state) if block.arch == "albef_mafa" else state)
        state = fit_position_embeddings(state, model.visual_encoder)
    may_miss = NOT_SCORING if mines else (*NOT_SCORING, *PROJECTIONS)
    state = {name: value for name, value in state.items() if not name.startswith(may_miss)}
    frozen_elsewhere = block.arch == "blip2_mafa" and not stored_vit
    may_miss = (*may_miss, VIT) if frozen_elsewhere else may_miss
    _load(model, state, f"{flag}: {path}", may_miss)
    return model.eval().requires_grad_(False).to(device)


def _plain(block: MafaBlock, vit_from_checkpoint: bool) -> Any:
    """The same sizes, without what would be loaded only to be overwritten, and without a teacher and a Con-D of its own."""
    parts: Any = {
        name: replace(getattr(block, name), init=None)
        for name in ("image_encoder", "text_encoder", "qformer")
        if hasattr(block, name) and (name != "image_encoder" or vit_from_checkpoint)
    }
    itc, ecm = replace(block.itc, momentum_distillation=None), replace(block.ecm, enabled=False)
    return replace(block, pretrained=None, discriminator=None, itc=itc, ecm=ecm, **parts)


def _load(model: torch.nn.Module, state: dict[str, Tensor], source: str, may_miss: tuple[str, ...]) -> None:
    own = model.state_dict()  # full names: `may_miss` of load_exactly looks for parts of names anywhere
    load_exactly(model, state, source, may_miss=tuple(name for name in own if name.startswith(may_miss)))
