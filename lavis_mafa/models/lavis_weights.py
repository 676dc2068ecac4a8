"""Weights of LAVIS's own models: what LAVIS would fail at in a checkpoint, and what a model took from it."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lavis_mafa.config.checkpoints import shapes_of
from lavis_mafa.errors import UserError
from lavis_mafa.weights import read_weights

logger = logging.getLogger(__name__)
OF_TEACHER = "visual_encoder_m.pos_embed"
READ_THEIR_TEACHER = ("albef_vqa", "blip_retrieval", "blip_classification")


def source_of(config: Any) -> tuple[str, str] | None:
    """Key and path of the local file that LAVIS loads a model from: ``finetuned``, or ``pretrained`` with ``load_finetuned: false``."""
    key = "finetuned" if config.get("load_finetuned", True) else "pretrained"
    path = config.get(key)
    return (f"model.{key}", path) if isinstance(path, str) and Path(path).is_file() else None


def check_start(config: Any) -> None:
    """What LAVIS would answer with a traceback from inside its loading; raises UserError."""
    source = source_of(config)
    if source is None or source[0] != "model.pretrained":
        return
    key, path = source
    export = f"`lavis-mafa export {path} --for {config.arch} --output X.pth` writes"
    if config.arch == "albef_nlvr":
        raise UserError(f"{key} is {path}, but LAVIS 1.0.2's albef_nlvr fails at every such file; {export} one for model.finetuned.")
    if config.arch == "albef_vqa" and not config.get("use_distill", True):
        where = f"at every {key}; {export} one for model.finetuned"
        raise UserError(f"model.use_distill is false, but LAVIS 1.0.2's albef_vqa then fails {where}.")
    if config.arch not in READ_THEIR_TEACHER:
        return
    shapes = shapes_of(path, key)
    if OF_TEACHER not in shapes:
        raise UserError(
            f"{key}: {path} has no momentum teacher ({OF_TEACHER}), which LAVIS's {config.arch} reads from it; "
            f"{export} a file with one."
        )
    if config.arch == "albef_vqa" and any(name.startswith("text_decoder.") for name in shapes):
        raise UserError(f"{key}: {path} has a decoder, which LAVIS's albef_vqa makes itself here; give the file as model.finetuned.")


def build_model(task: Any, config: Any) -> Any:
    """LAVIS's model, and a word on what it took from its checkpoint. Raises UserError: it cannot be loaded, or gave nothing."""
    check_start(config.model_cfg)
    try:
        model = task.build_model(config)
    except RuntimeError as error:
        source = source_of(config.model_cfg)
        if source is None or "size mismatch for" not in str(error):
            raise
        sizes = [line.strip() for line in str(error).splitlines() if "size mismatch for" in line]
        raise UserError(f"{source[0]}: {source[1]} is of another size than {config.model_cfg.arch}: {sizes[0]}") from error
    report_keys(model, config.model_cfg)
    return model


def report_keys(model: torch.nn.Module, config: Any) -> None:
    """Compare what a LAVIS model holds with the file that it was loaded from, by values: LAVIS renames as it loads.

    Args:
        model: as LAVIS built it.
        config: its ``model`` block.

    Raises:
        UserError: it holds none of the file's matrices.
    """
    source = source_of(config)
    if source is None:
        return
    key, path = source
    own, theirs = model.state_dict(), read_weights(path, key)
    taken = {name for name, value in theirs.items() if _holds(own, name, value)}
    by_name = {_without_bert(name) for name in taken}
    rest = {name: _mark(value) for name, value in own.items() if _without_bert(name) not in by_name}
    under_another = {name for name, value in theirs.items() if name not in taken and _mark(value) in set(rest.values()) - {None}}
    marks = {_mark(theirs[name]) for name in under_another}
    missing = [name for name, mark in rest.items() if (mark is None or mark not in marks) and not name.endswith("position_ids")]
    taken |= under_another
    left_over = [name for name in theirs if name not in taken and not name.endswith("position_ids")]
    matrices = [name for name, value in theirs.items() if _mark(value) is not None]
    if matrices and not taken.intersection(matrices):
        name = next((n for n in matrices if n in own), matrices[0])
        wanted = f" (wanted {list(own[name].shape)})" if name in own else ", which it has not"
        raise UserError(
            f"{key}: {path} gave {config.arch} none of its weights: it has {name} {list(theirs[name].shape)}{wanted}. Give a "
            "checkpoint of this architecture and size, with LAVIS's names."
        )
    misfits = f"{_by_part('missing', missing)}; {_by_part('left over', left_over)}"
    few = 2 * len(taken.intersection(matrices)) < len(matrices)
    logger.log(logging.WARNING if few else logging.INFO, "%s: %d weights taken from %s; %s", key, len(taken), path, misfits)


def _without_bert(name: str) -> str:
    return name.replace("bert.", "")  # LAVIS takes it out of the names of a text encoder


def _holds(own: dict[str, Tensor], name: str, value: Tensor) -> bool:
    """Has the model this weight under its name? Position embeddings may have been resized."""
    for candidate in (name, _without_bert(name), name.replace("text_encoder.", "text_encoder.bert.")):
        held = own.get(candidate)
        if held is not None and held.shape == value.shape:
            return torch.equal(value.to(held.dtype), held.cpu())
        if held is not None and name.endswith("pos_embed"):
            return held.shape[-1] == value.shape[-1]
    return False


def _mark(value: Tensor) -> tuple[Any, ...] | None:
    """Nearly as good as the values themselves, to find a matrix under any name; None for what is too plain to be told apart."""
    if value.dim() < 2 or not value.is_floating_point() or value.numel() < 8:
        return None
    some = value.flatten()[:: max(1, value.numel() // 64)].half()
    return None if bool((some == some[0]).all()) else (*value.shape, *some.tolist())


def _by_part(kind: str, names: list[str]) -> str:
    """``23 missing (opt_model 21, opt_proj 2)``"""
    parts = Counter(name.split(".")[0] for name in names)
    return f"{len(names)} {kind}" + (f" ({', '.join(f'{part} {count}' for part, count in parts.items())})" if names else "")
