"""What kind of checkpoint a file is, from its names and shapes alone: a mix-up is found before any weight is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavis_mafa.common.check import FAMILIES, con_d_block
from lavis_mafa.common.errors import UserError
from lavis_mafa.common.weights import read_weights
from lavis_mafa.common.words import ADDED, words_of_tokenizer

STAGE_1, STAGE_2, T5 = "a BLIP-2 stage-1 checkpoint", "a BLIP-2 stage-2 checkpoint", "a BLIP-2 checkpoint with T5"
INSTRUCT, BLIP, ALBEF = "an InstructBLIP checkpoint", "a BLIP checkpoint", "an ALBEF checkpoint"
CLIP_L = "a BLIP-2 checkpoint with CLIP's ViT-L (LAVIS's clip_L, pretrain_vitL), whose image encoder is not EVA's"
OF_MODEL = {"blip2_mafa": STAGE_1, "blip2_opt_mafa": STAGE_2, "blip_mafa": BLIP, "albef_mafa": ALBEF}
OTHERS = {  # part of a name -> what has such names
    "lora_": "an adapter (LoRA) without its base model",
    "logit_scale": "a CLIP checkpoint",
    "decoder.embed_tokens.": "a language model",
    "blocks.0.attn.": "an image encoder alone",
    "embeddings.word_embeddings.": "a BERT",
}
# what only language modelling needs, and what it is
LANGUAGE = {
    "albef_mafa": ("text_encoder.cls.", "MLM head", "model.mlm.mask_probability: 0"),
    "blip_mafa": ("text_decoder.", "text decoder", "model.lm.weight: 0"),
    "blip2_mafa": ("Qformer.cls.", "LM head", "model.lm.weight: 0"),
}
SIZE = "{} layers of width {}"
PARTS = {  # part of a model block -> what it is, its layers' names, and where its width is seen
    "qformer": ("a Q-Former", re.compile(r"Qformer\.bert\.encoder\.layer\.(\d+)\."), ("query_tokens",)),
    "text_encoder": (
        "a text encoder",
        re.compile(r"text_encoder\.(?:bert\.)?encoder\.layer\.(\d+)\."),
        ("text_encoder.bert.embeddings.LayerNorm.weight", "text_encoder.embeddings.LayerNorm.weight"),
    ),
    "image_encoder": ("an image encoder", re.compile(r"visual_encoder\.blocks\.(\d+)\."), ("visual_encoder.cls_token",)),
}
EMBEDDINGS = tuple(
    f"{part}.embeddings.word_embeddings.weight" for part in ("text_encoder.bert", "text_encoder", "text_decoder.bert", "Qformer.bert")
)
Shapes = dict[str, list[int]]


def shapes_of(path: str | Path, key: str) -> Shapes:
    """Name -> shape of a checkpoint's weights, without reading them.

    Raises:
        UserError: the file is missing or no checkpoint.
    """
    return {name: list(value.shape) for name, value in read_weights(path, key, names_only=True).items()}


def kind_of(names: Mapping[str, Any]) -> str | None:
    """The kind by the parts it alone has; None for something else."""
    if "query_tokens" in names:
        if "visual_encoder.class_embedding" in names:
            return CLIP_L
        of_language = {"opt_": STAGE_2, "t5_": T5, "llm_": INSTRUCT}  # each is followed by `proj.` and `model.`
        return next((kind for start, kind in of_language.items() if any(name.startswith(start) for name in names)), STAGE_1)
    # BLIP's text layers all look at the image; ALBEF's first ones read the text alone
    if any(name.startswith("text_encoder.encoder.layer.0.crossattention.") for name in names):
        return BLIP
    if any(name.startswith("text_encoder.") for name in names):
        return ALBEF
    return BLIP if any(name.startswith("text_decoder.") for name in names) else None


def check_kind(names: Mapping[str, Any], wanted: str, source: str, arch: str) -> None:
    """A checkpoint is of the kind that ``arch`` needs.

    Args:
        source: key and file, as ``model.pretrained: x.pth``.

    Raises:
        UserError: it is another; the message says what it is and where it belongs.
    """
    found = kind_of(names)
    if found == wanted:
        return
    hints: dict[tuple[str, str | None], str] = {
        ("model.pretrained", STAGE_1): " Give it as model.stage_1 to train stage 2 on it.",
        ("model.stage_1", STAGE_2): " Give it as model.pretrained to go on from it or to evaluate it.",
        ("model.pretrained", STAGE_2): " Its model is blip2_opt_mafa.",
        ("model.pretrained", BLIP): " Its model is blip_mafa.",
        ("model.pretrained", ALBEF): " Its model is albef_mafa.",
    }
    other = found or next((what for part, what in OTHERS.items() if any(part in name for name in names)), "something else")
    some = "" if found else f" It has {', '.join(list(names)[:3])}{', ...' if len(names) > 3 else ''}."
    raise UserError(f"{source} is {other}, but {arch} needs {wanted} here.{hints.get((source.split(':')[0], found), '')}{some}")


def check_kinds(block: Any, evaluate: bool = False) -> None:
    """The checkpoints that a typed ``model:`` block names are of the right kind and size, and have what the job needs.

    Args:
        evaluate: nothing is trained and no caption written, so that no language head is asked.

    Raises:
        UserError: a mix-up; the message says what the file is and where it belongs.
    """
    if block.pretrained is not None:
        shapes = _expect(OF_MODEL[block.arch], block.pretrained, "model.pretrained", block.arch)
        _check_sizes(block, shapes, f"model.pretrained: {block.pretrained}", "model")
        if not evaluate and _models_language(block) and (lacking := lacks_language(shapes, block.arch)):
            raise UserError(
                f"model.pretrained: {block.pretrained} has no {lacking}, which training would start at random; give a checkpoint of "
                f"pre-training, or leave it out of training by {LANGUAGE[block.arch][2]}."
            )
    if getattr(block, "stage_1", None) is not None:
        shapes = _expect(STAGE_1, block.stage_1, "model.stage_1", block.arch)
        _check_sizes(block, shapes, f"model.stage_1: {block.stage_1}", "model")
    con_d = getattr(block, "discriminator", None)
    if con_d is not None and con_d.checkpoint and block.ecm.enabled and con_d.arch != "ground_truth":
        shapes = _expect(OF_MODEL[FAMILIES[con_d.arch]], con_d.checkpoint, "model.discriminator.checkpoint", con_d.arch)
        _check_sizes(con_d_block(block), shapes, f"model.discriminator.checkpoint: {con_d.checkpoint}", "model.discriminator")


def lacks_language(names: Mapping[str, Any], arch: str) -> str | None:
    """``MLM head (text_encoder.cls)`` where a checkpoint has nothing of it; half of it is for the loading to name."""
    part, what, _ = LANGUAGE.get(arch, ("", "", ""))
    return None if any(name.startswith(part) for name in names) else f"{what} ({part.rstrip('.')})"


def _models_language(block: Any) -> bool:
    weights = [getattr(getattr(block, part, None), "weight", 1.0) for part in ("mlm", "lm")]
    return all(weights) and getattr(getattr(block, "mlm", None), "mask_probability", 1.0) > 0


def _expect(wanted: str, path: str, key: str, arch: str) -> Shapes:
    shapes = shapes_of(path, key)
    check_kind(shapes, wanted, f"{key}: {path}", arch)
    return shapes


def _check_sizes(block: Any, shapes: Shapes, source: str, shown: str) -> None:
    """Layers and widths of the encoders; the loading would list every weight."""
    misfits = []
    for part, (what, layer, of_width) in PARTS.items():
        settings = getattr(block, part, None)
        numbers = [int(found[1]) for name in shapes if (found := layer.match(name))]
        width = next((shapes[name][-1] for name in of_width if name in shapes), None)
        if settings is None or not numbers or width is None:
            continue
        sizes, wanted, text = [1 + max(numbers), width], [getattr(settings, "layers", None) or settings.depth, settings.width], SIZE
        if part == "qformer":
            sizes, wanted, text = [*sizes, shapes["query_tokens"][1]], [*wanted, settings.queries], f"{SIZE} with {{}} queries"
        if sizes != wanted:
            misfits.append(f"{what} of {text.format(*sizes)}, but {text.format(*wanted)} is set; give its sizes in {shown}.{part}")
    if misfits:
        raise UserError(f"{source} does not fit the model: it has " + ", and ".join(misfits) + f", or another model_type in {shown}.")
    rows = next((shapes[name][0] for name in EMBEDDINGS if name in shapes), None)
    words = words_of_tokenizer(block.tokenizer) if hasattr(block, "tokenizer") else None
    if rows is not None and words is not None and rows not in (words, words + ADDED[block.arch]):
        raise UserError(
            f"{source} has embeddings of {rows} words, but model.tokenizer ({block.tokenizer}) has {words}; give the tokenizer that it "
            "was trained with."
        )
    wide = shapes.get("ln_vision.weight", [0])[0]
    if wide and wide != block.image_encoder.width:
        what = f"{CLIP_L}" if wide == 1024 else f"a checkpoint for an image encoder of width {wide}"
        raise UserError(f"{source} is {what}; {shown}.image_encoder.width is {block.image_encoder.width}.")
