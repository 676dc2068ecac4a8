"""What kind of checkpoint a file is, from its names and shapes alone: a mix-up is found before any weight is loaded."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from lavis_mafa.common.check import FAMILIES, con_d_block
from lavis_mafa.common.errors import Mistakes, UserError
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


def check_kinds(block: Any, absent: Collection[str] = ()) -> None:
    """The checkpoints that a typed ``model:`` block names are of the right kind and of the sizes that are set.

    Args:
        absent: keys of checkpoints that are known not to be there.

    Raises:
        UserError: a mix-up; the message says what the file is and where it belongs.
    """
    found = Mistakes()
    named = [("model.pretrained", block.pretrained, OF_MODEL[block.arch], block.arch, block)]
    named.append(("model.stage_1", getattr(block, "stage_1", None), STAGE_1, block.arch, block))
    con_d = getattr(block, "discriminator", None)
    if con_d is not None and block.ecm.enabled and con_d.arch != "ground_truth":
        family = OF_MODEL[FAMILIES[con_d.arch]]
        named.append(("model.discriminator.checkpoint", con_d.checkpoint, family, con_d.arch, con_d_block(block)))
    for key, path, kind, arch, settings in named:
        if path is not None and key not in absent and (shapes := found(_expect, kind, path, key, arch)) is not None:
            found(_check_size, settings, shapes, path, key)
    found.end()


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


def _check_size(settings: Any, shapes: Shapes, path: str, key: str) -> None:
    """The parts have the sizes that are set, as far as the file has them."""
    names = {"image_encoder": "a ViT", "text_encoder": "a text encoder", "qformer": "a Q-Former"}
    for part, found in sizes_of(shapes).items():
        block = getattr(settings, part, None)
        wanted = {name: getattr(block, name, None) for name in found}
        if block is not None and found != wanted:
            parent = "model.discriminator" if key == "model.discriminator.checkpoint" else "model"
            raise UserError(
                f"{key}: {path} does not fit the model: it has {names[part]} of {_size(found)}, but {_size(wanted)} is set; "
                f"give its sizes in {parent}.{part}."
            )


def _size(sizes: dict[str, Any]) -> str:
    """``12 layers of width 768 with 32 queries``"""
    words = {"queries": " with {} queries", "fusion_layer": ", {} of them for texts alone", "patch_size": " with patches of {} pixels"}
    more = "".join(text.format(sizes[name]) for name, text in words.items() if name in sizes)
    return f"{sizes.get('layers', sizes.get('depth'))} layers of width {sizes['width']}{more}"


def sizes_of(shapes: Shapes) -> dict[str, dict[str, int]]:
    """The sizes that names and shapes tell, by the part's block in a YAML.

    Example:
        >>> sizes_of(shapes_of("albef.pth", "model.pretrained"))["text_encoder"]
        {'layers': 12, 'width': 768, 'fusion_layer': 6}
    """
    shapes = {name.replace("text_encoder.bert.", "text_encoder."): shape for name, shape in shapes.items()}
    sizes: dict[str, dict[str, int]] = {}
    if "visual_encoder.patch_embed.proj.weight" in shapes:
        width, _, patch, _ = shapes["visual_encoder.patch_embed.proj.weight"]
        sizes["image_encoder"] = {"depth": _count("visual_encoder.blocks.", shapes), "width": width, "patch_size": patch}
    if "query_tokens" in shapes:
        queries, width = shapes["query_tokens"][1:]
        sizes["qformer"] = {"layers": _count("Qformer.bert.encoder.layer.", shapes), "width": width, "queries": queries}
    word_embeddings = "text_encoder.embeddings.word_embeddings.weight"
    if word_embeddings in shapes:
        encoder = "text_encoder.encoder.layer."
        sizes["text_encoder"] = {"layers": _count(encoder, shapes), "width": shapes[word_embeddings][1]}
        if f"{encoder}0.crossattention.self.query.weight" not in shapes:
            crossing = [int(n.split(".")[3]) for n in shapes if n.startswith(encoder) and ".crossattention." in n]
            sizes["text_encoder"]["fusion_layer"] = min(crossing, default=sizes["text_encoder"]["layers"])
    return sizes


def _count(prefix: str, shapes: Shapes) -> int:
    """``N`` where the names go on with 0. to N - 1."""
    return 1 + max((int(name[len(prefix) :].split(".")[0]) for name in shapes if name.startswith(prefix)), default=-1)
