"""What kind of checkpoint a file is, from its names and shapes alone: a mix-up is found before any weight is loaded."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from lavis_mafa.common.check import FAMILIES, con_d_block
from lavis_mafa.common.errors import UserError
from lavis_mafa.common.weights import read_weights

logger = logging.getLogger(__name__)
STAGE_1, STAGE_2, T5 = "a BLIP-2 stage-1 checkpoint", "a BLIP-2 stage-2 checkpoint", "a BLIP-2 checkpoint with T5"
INSTRUCT, BLIP, ALBEF = "an InstructBLIP checkpoint", "a BLIP checkpoint", "an ALBEF checkpoint"
OF_MODEL = {"blip2_mafa": STAGE_1, "blip2_opt_mafa": STAGE_2, "blip_mafa": BLIP, "albef_mafa": ALBEF}
Shapes = dict[str, list[int]]


def shapes_of(path: str | Path, key: str) -> Shapes:
    """Name -> shape of a checkpoint's weights, without reading them.

    Raises:
        UserError: the file is missing or no checkpoint.
    """
    return {name: list(value.shape) for name, value in read_weights(path, key, names_only=True).items()}


def kind_of(shapes: Shapes) -> str | None:
    """The kind by the parts it alone has; None for something else."""
    if "query_tokens" in shapes:
        of_language = {"opt_proj.weight": STAGE_2, "t5_proj.weight": T5, "llm_proj.weight": INSTRUCT}
        return next((kind for name, kind in of_language.items() if name in shapes), STAGE_1)
    # BLIP's text layers all look at the image; ALBEF's first ones read the text alone
    if any(name.startswith(("text_decoder.", "text_encoder.encoder.layer.0.crossattention.")) for name in shapes):
        return BLIP
    return ALBEF if any(name.startswith("text_encoder.") for name in shapes) else None


def check_kinds(block: Any) -> None:
    """The checkpoints that a typed ``model:`` block names are of the right kind, and Con-D's Q-Former of the right size.

    Raises:
        UserError: a mix-up; the message says what the file is and where it belongs.
    """
    if block.pretrained is not None:
        _expect(OF_MODEL[block.arch], block.pretrained, "model.pretrained", block.arch)
    if getattr(block, "stage_1", None) is not None:
        _expect(STAGE_1, block.stage_1, "model.stage_1", block.arch)
    con_d = getattr(block, "discriminator", None)
    if con_d is not None and con_d.checkpoint and block.ecm.enabled and con_d.arch != "ground_truth":
        family = OF_MODEL[FAMILIES[con_d.arch]]
        shapes = _expect(family, con_d.checkpoint, "model.discriminator.checkpoint", con_d.arch)
        if family == STAGE_1:
            _check_qformer(con_d_block(block).qformer, shapes, con_d.checkpoint)


def report_keys(model: torch.nn.Module, config: Any) -> None:
    """Say what a LAVIS model took from its checkpoint: LAVIS loads with ``strict=False`` and keeps what did not fit to itself.

    Args:
        model: as LAVIS built it.
        config: its ``model`` block; ``finetuned`` is what LAVIS loads, or ``pretrained`` with ``load_finetuned: false``.
    """
    key = "finetuned" if config.get("load_finetuned", True) else "pretrained"
    path = config.get(key)
    if not isinstance(path, str) or not Path(path).is_file():
        return
    own, theirs = model.state_dict(), shapes_of(path, f"model.{key}")
    taken = {name for name, shape in theirs.items() if name in own and list(own[name].shape) == shape}
    missing = [name for name in own if name not in taken and not name.endswith("position_ids")]
    left_over = [name for name in theirs if name not in taken and not name.endswith("position_ids")]
    misfits = f"{_by_part('missing', missing)}; {_by_part('left over', left_over)}"
    logger.info("model.%s: %d weights taken from %s; %s", key, len(taken), path, misfits)


def _by_part(kind: str, names: list[str]) -> str:
    """``23 missing (opt_model 21, opt_proj 2)``"""
    parts = Counter(name.split(".")[0] for name in names)
    return f"{len(names)} {kind}" + (f" ({', '.join(f'{part} {count}' for part, count in parts.items())})" if names else "")


def _expect(wanted: str, path: str, key: str, arch: str) -> Shapes:
    shapes = shapes_of(path, key)
    found = kind_of(shapes)
    if found != wanted:
        hints: dict[tuple[str, str | None], str] = {
            ("model.pretrained", STAGE_1): " Give it as model.stage_1 to train stage 2 on it.",
            ("model.stage_1", STAGE_2): " Give it as model.pretrained to go on from it or to evaluate it.",
            ("model.pretrained", STAGE_2): " Its model is blip2_opt_mafa.",
        }
        hint = hints.get((key, found), "")
        raise UserError(f"{key}: {path} is {found or 'something else'}, but {arch} needs {wanted} here.{hint}")
    return shapes


def _check_qformer(settings: Any, shapes: Shapes, path: str) -> None:
    queries, width = shapes["query_tokens"][1:]
    layers = 1 + max((int(n.split(".")[4]) for n in shapes if n.startswith("Qformer.bert.encoder.layer.")), default=-1)
    found, wanted = (layers, width, queries), (settings.layers, settings.width, settings.queries)
    if found != wanted:
        size = "{} layers of width {} with {} queries"
        raise UserError(
            f"model.discriminator.checkpoint: {path} has a Q-Former of {size.format(*found)}, but {size.format(*wanted)} is set; "
            "give its sizes in model.discriminator.qformer."
        )
