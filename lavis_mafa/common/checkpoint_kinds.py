"""What kind of checkpoint a file is, from its names and shapes alone: a mix-up is found before any weight is loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lavis_mafa.common.check import FAMILIES, con_d_block
from lavis_mafa.common.errors import Mistakes, UserError
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
PARTS = {"qformer": "a Q-Former", "text_encoder": "a text encoder", "image_encoder": "an image encoder"}
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


def check_kinds(block: Any, absent: Collection[str] = (), evaluate: bool = False) -> None:
    """The checkpoints that a typed ``model:`` block names are of the right kind and size, and have what the job needs.

    Args:
        absent: keys of checkpoints that are known not to be there.
        evaluate: nothing is trained and no caption written, so that no language head is asked.

    Raises:
        UserError: a mix-up; the message says what the file is and where it belongs.
    """
    found = Mistakes()
    if block.pretrained is not None and "model.pretrained" not in absent:
        shapes = found(_expect, block, OF_MODEL[block.arch], block.pretrained, "model.pretrained")
        if shapes and not evaluate and _models_language(block) and (lacking := lacks_language(shapes, block.arch)):
            found.add(
                f"model.pretrained: {block.pretrained} has no {lacking}, which training would start at random; give a checkpoint of "
                f"pre-training, or leave it out of training by {LANGUAGE[block.arch][2]}."
            )
    if getattr(block, "stage_1", None) is not None and "model.stage_1" not in absent:
        found(_expect, block, STAGE_1, block.stage_1, "model.stage_1")
    con_d, key = getattr(block, "discriminator", None), "model.discriminator.checkpoint"
    if con_d is not None and con_d.checkpoint and block.ecm.enabled and con_d.arch != "ground_truth" and key not in absent:
        found(_expect, con_d_block(block), OF_MODEL[FAMILIES[con_d.arch]], con_d.checkpoint, key, con_d.arch)
    found.end()


def lacks_language(names: Mapping[str, Any], arch: str) -> str | None:
    """``MLM head (text_encoder.cls)`` where a checkpoint has nothing of it; half of it is for the loading to name."""
    part, what, _ = LANGUAGE.get(arch, ("", "", ""))
    return None if any(name.startswith(part) for name in names) else f"{what} ({part.rstrip('.')})"


def _models_language(block: Any) -> bool:
    weights = [getattr(getattr(block, part, None), "weight", 1.0) for part in ("mlm", "lm")]
    return all(weights) and getattr(getattr(block, "mlm", None), "mask_probability", 1.0) > 0


def _expect(block: Any, wanted: str, path: str, key: str, arch: str = "") -> Shapes:
    """The shapes of a file that is of the ``wanted`` kind and fits ``block``, the model's or its Con-D's."""
    shapes, source = shapes_of(path, key), f"{key}: {path}"
    check_kind(shapes, wanted, source, arch or block.arch)
    _check_sizes(block, shapes, source, key.removesuffix(".checkpoint") if key.endswith(".checkpoint") else "model")
    return shapes


def _check_sizes(block: Any, shapes: Shapes, source: str, shown: str) -> None:
    """Layers and widths of the encoders; the loading would list every weight."""
    misfits = []
    for part, sizes in sizes_of(shapes).items():
        settings = getattr(block, part, None)
        wanted = {name: getattr(settings, name, None) for name in sizes}
        if settings is not None and sizes != wanted:
            told = {"queries", *(name for name in sizes if sizes[name] != wanted[name])}
            misfits.append(f"{PARTS[part]} of {_size(sizes, told)}, but {_size(wanted, told)} is set; give its sizes in {shown}.{part}")
    if misfits:
        raise UserError(f"{source} does not fit the model: it has " + ", and ".join(misfits) + f", or another model_type in {shown}.")
    rows = next((shapes[name][0] for name in EMBEDDINGS if shapes.get(name)), None)
    words = words_of_tokenizer(block.tokenizer) if hasattr(block, "tokenizer") else None
    if rows is not None and words is not None and rows not in (words, words + ADDED[block.arch]):
        raise UserError(
            f"{source} has embeddings of {rows} words, but model.tokenizer ({block.tokenizer}) has {words}; give the tokenizer that it "
            "was trained with."
        )
    wide = (shapes.get("ln_vision.weight") or [0])[0]
    if wide and wide != block.image_encoder.width:
        what = f"{CLIP_L}" if wide == 1024 else f"a checkpoint for an image encoder of width {wide}"
        raise UserError(f"{source} is {what}; {shown}.image_encoder.width is {block.image_encoder.width}.")


def _size(sizes: dict[str, Any], told: Collection[str]) -> str:
    """``12 layers of width 768 with 32 queries``"""
    words = {"queries": " with {} queries", "fusion_layer": ", {} of them for texts alone", "patch_size": " with patches of {} pixels"}
    more = "".join(text.format(sizes[name]) for name, text in words.items() if name in sizes and name in told)
    return f"{sizes.get('layers', sizes.get('depth'))} layers of width {sizes['width']}{more}"


def sizes_of(shapes: Shapes) -> dict[str, dict[str, int]]:
    """The sizes that names and shapes tell, by the part's block in a YAML; tensors of another rank than theirs tell nothing.

    Example:
        >>> sizes_of(shapes_of("albef.pth", "model.pretrained"))["text_encoder"]
        {'layers': 12, 'width': 768, 'fusion_layer': 6}
    """
    shapes = {name.replace("text_encoder.bert.", "text_encoder."): shape for name, shape in shapes.items()}
    sizes: dict[str, dict[str, int]] = {}

    def shape(name: str, rank: int) -> list[int] | None:
        found = shapes.get(name, [])
        return found if len(found) == rank else None

    if patches := shape("visual_encoder.patch_embed.proj.weight", 4):
        width, _, patch, _ = patches
        sizes["image_encoder"] = {"depth": _count("visual_encoder.blocks.", shapes), "width": width, "patch_size": patch}
    if tokens := shape("query_tokens", 3):
        _, queries, width = tokens
        sizes["qformer"] = {"layers": _count("Qformer.bert.encoder.layer.", shapes), "width": width, "queries": queries}
    if words := shape("text_encoder.embeddings.word_embeddings.weight", 2):
        encoder = "text_encoder.encoder.layer."
        sizes["text_encoder"] = {"layers": _count(encoder, shapes), "width": words[1]}
        if f"{encoder}0.crossattention.self.query.weight" not in shapes:
            crossing = [int(n.split(".")[3]) for n in shapes if n.startswith(encoder) and ".crossattention." in n]
            sizes["text_encoder"]["fusion_layer"] = min(crossing, default=sizes["text_encoder"]["layers"])
    return sizes


def _count(prefix: str, shapes: Shapes) -> int:
    """``N`` where the names go on with 0. to N - 1."""
    return 1 + max((int(name[len(prefix) :].split(".")[0]) for name in shapes if name.startswith(prefix)), default=-1)
