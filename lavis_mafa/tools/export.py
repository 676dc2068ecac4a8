"""Checkpoints for LAVIS's own classes and for transformers: what those need that ours, LAVIS's and the authors' files lack.

Each part is a pure function of a state dict by LAVIS's names, as :func:`lavis_mafa.weights.read_weights` gives them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BlipConfig, BlipForImageTextRetrieval, BlipImageProcessor, BlipProcessor

from lavis_mafa.config.checkpoints import ALBEF, BLIP, STAGE_1, kind_of, one_task, sizes_of, what_is
from lavis_mafa.errors import UserError
from lavis_mafa.files import built_folder
from lavis_mafa.models.albef_nlvr import doubled_weights
from lavis_mafa.models.albef_vqa import decoder_of
from lavis_mafa.models.encoders import build_blip_tokenizer, fold_token_type, with_bert
from lavis_mafa.models.hub import shared_model
from lavis_mafa.models.momentum import MOMENTUM_PARTS, TEACHERS
from lavis_mafa.models.transformer import POSITIONS
from lavis_mafa.models.vit import EPSILON, resize_positions
from lavis_mafa.weights import QFORMER, VISION, load_exactly, read_checkpoint, weight_files

State = dict[str, Tensor]
LAYER = re.compile(r"^text_encoder\.encoder\.layer\.(\d+)\.")
ENCODERS, HEADS = ("visual_encoder", "text_encoder"), ("vision_proj", "text_proj", "itm_head")
PRETRAINED, FINETUNED = "model.pretrained (load_finetuned: false)", "model.finetuned (load_finetuned: true)"


@dataclass(frozen=True)
class Target:
    """A class of LAVIS 1.0.2, by what it holds."""

    kind: str
    parts: tuple[str, ...]  # of which a file must have something
    taught: tuple[str, ...] = ()  # which of them its teacher copies, under names with `_m`
    may_have: tuple[str, ...] = ()  # that may start at random there
    queue: int = 0  # LAVIS's own size of its queues; 0: it has none
    keyed: bool = False  # are queued features named by their images
    given_as: str = PRETRAINED  # which of LAVIS's settings takes the file


TARGETS = {
    "albef_pretrain": Target(ALBEF, (*ENCODERS, "text_encoder.cls", *HEADS, "temp"), MOMENTUM_PARTS, queue=65536),
    "albef_retrieval": Target(ALBEF, (*ENCODERS, *HEADS, "temp"), MOMENTUM_PARTS, queue=65536, keyed=True),
    "albef_classification": Target(ALBEF, ENCODERS, (*ENCODERS, "cls_head"), ("cls_head",)),
    "albef_vqa": Target(ALBEF, (*ENCODERS, "text_decoder"), (*ENCODERS, "text_decoder"), given_as=FINETUNED),
    "albef_nlvr": Target(ALBEF, ENCODERS, (*ENCODERS, "cls_head"), ("cls_head",), given_as=FINETUNED),
    "blip_pretrain": Target(BLIP, (*ENCODERS, "text_decoder", *HEADS, "temp"), MOMENTUM_PARTS, queue=57600),
    "blip_retrieval": Target(BLIP, (*ENCODERS, *HEADS, "temp"), MOMENTUM_PARTS, queue=57600, keyed=True),
    "blip_caption": Target(BLIP, ("visual_encoder", "text_decoder")),
    "blip_vqa": Target(BLIP, (*ENCODERS, "text_decoder")),
    "blip_classification": Target(BLIP, ENCODERS, (*ENCODERS, "cls_head"), ("cls_head",)),
    "blip_nlvr": Target(BLIP, ENCODERS, (), ("cls_head",)),
    "blip2": Target(STAGE_1, ("ln_vision", "Qformer", "Qformer.cls", "query_tokens", *HEADS, "temp"), (), ("visual_encoder",)),
}
HF_BLIP = "hf-blip"
OF_OPT = {"opt_proj.": "language_projection.", "opt_model.": "language_model."}
OF_QFORMER = {ours: theirs for theirs, ours in QFORMER.items()} | {"Qformer.bert.": "qformer."}


def fitting(state: State) -> list[str]:
    """Which targets a checkpoint has everything for."""
    kind, state = kind_of(state), plain(state)
    _, of_task = one_task(state, kind)
    if of_task == "albef_classification" and is_doubled(state):
        of_task = "albef_nlvr"
    found = [to for to, target in TARGETS.items() if target.kind == kind and not _lacking(state, to) and of_task in ("", to)]
    return [*found, *([HF_BLIP] if "blip_retrieval" in found else [])]


def plain(state: State) -> State:
    """Without teacher, queues and poolers, token types folded in, and the text encoder of ALBEF without ``bert.`` in its names."""
    unused = (*TEACHERS, "cls_head_m.")
    state = {name: value for name, value in state.items() if not name.startswith(unused) and ".pooler." not in name}
    return {name.replace("text_encoder.bert.", "text_encoder.", 1): value for name, value in fold_token_type(state).items()}


def _lacking(state: State, to: str) -> list[str]:
    """Parts of a target that a plain state dict has not, and that cannot be made of others."""
    made = ("text_decoder",) if to == "albef_vqa" and any(name.startswith("text_encoder.cls.") for name in state) else ()
    return [part for part in TARGETS[to].parts if part not in made and not any(_is_of(part, name) for name in state)]


def _is_of(part: str, name: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def exported(state: State, to: str, source: str, queue_size: int | None = None, image_size: int | None = None) -> State:
    """A checkpoint by the names of LAVIS's class ``to``: every weight of that class that the checkpoint can give, and no other.

    The teacher starts as a copy of the student and queues are filled with random directions. What may be absent is a head that the
    task has alone (``cls_head``), and a frozen image encoder of BLIP-2. Copies share the student's memory.

    Args:
        state: of :func:`lavis_mafa.weights.read_weights`.
        source: what messages call it.
        queue_size: of its queues; null: LAVIS's own.
        image_size: pixels that position embeddings are resized for; null: those of the checkpoint.

    Raises:
        UserError: the checkpoint is of another kind, or lacks a part.
    """
    _check_fits(state, to, source)
    target, state = TARGETS[to], plain(state)
    if to == "albef_vqa" and not any(_is_of("text_decoder", name) for name in state):
        state = {**state, **decoder_of(with_bert(state), _fusion_layer(state))}
    elif to == "albef_nlvr" and not is_doubled(state):
        state = doubled_weights(state, _fusion_layer(state))
    elif to == "blip_nlvr":
        state = for_two_images(state)
    parts = (*target.parts, *target.may_have)
    state = {name: value for name, value in state.items() if any(_is_of(part, name) for part in parts)}
    if to == "albef_pretrain":
        state = with_bert(state)
    elif target.kind == ALBEF:  # the head of language modelling is part of no other
        state = {name: value for name, value in state.items() if not name.startswith("text_encoder.cls.")}
    if image_size is not None:
        state = at_image_size(state, image_size, source)
    copies = {_in_teacher(name): value for name, value in state.items() if name.split(".")[0] in target.taught}
    return {**state, **copies, **fresh_queues(state, target, queue_size)}


def _in_teacher(name: str) -> str:
    part, _, rest = name.partition(".")
    return f"{part}_m.{rest}"


def _check_fits(state: State, to: str, source: str) -> None:
    few, of = fitting(state), "blip_retrieval" if to == HF_BLIP else to
    if to in few:
        return
    lacking = _lacking(plain(state), of) if TARGETS[of].kind == kind_of(state) else []
    why = f"is {what_is(state)}{f' for {few[0]} alone' if len(few) == 1 else ''}, which gives no {to}"
    if lacking:
        why = f"has no {', '.join(lacking)}, which {to} needs"
    raise UserError(f"{source} {why}; " + (f"allowed with it: {', '.join(few)}." if few else "nothing can be made of it."))


# --- what a class needs ------------------------------------------------------------------------------------------------


def _fusion_layer(state: State) -> int:
    """F, the first layer of a plain ALBEF that looks at the image."""
    return sizes_of({name: list(value.shape) for name, value in state.items()})["text_encoder"]["fusion_layer"]


def is_doubled(state: State) -> bool:
    """Are the fusion layers of a plain ALBEF those of NLVR2, a couple for two images that shares its keys and values?"""
    fusing = sorted({int(m[1]) for name in state if (m := LAYER.match(name)) and ".crossattention." in name})
    key = "text_encoder.encoder.layer.{}.crossattention.self.key.weight"
    couples = [(state.get(key.format(a)), state.get(key.format(b))) for a, b in zip(fusing[::2], fusing[1::2], strict=False)]
    return bool(couples) and len(fusing) % 2 == 0 and all(a is not None and b is not None and torch.equal(a, b) for a, b in couples)


def for_two_images(state: State) -> State:
    """BLIP's cross-attention once for each of NLVR2's images."""
    found: State = {}
    for name, value in state.items():
        one = re.sub(r"\.crossattention\.(self|output\.dense)\.", r".crossattention.\g<1>{}.", name)
        found |= {one.format(which): value for which in (0, 1)}
    return found


def at_image_size(state: State, size: int, source: str) -> State:
    """Position embeddings of the image encoder for ``size`` pixels; raises UserError where its patches do not fill them."""
    name, patches = "visual_encoder.pos_embed", state.get("visual_encoder.patch_embed.proj.weight")
    if patches is None or name not in state:
        raise UserError(f"{source} has no image encoder, whose position embeddings --image-size could resize.")
    side = patches.shape[-1]
    if size % side:
        raise UserError(f"--image-size is {size}, but must be a multiple of {side}, the patches of {source}.")
    return {**state, name: resize_positions(state[name], (size // side) ** 2)}


def image_size_of(state: State) -> int:
    """Pixels of the images that position embeddings are for."""
    return math.isqrt(state["visual_encoder.pos_embed"].shape[1] - 1) * state["visual_encoder.patch_embed.proj.weight"].shape[-1]


def fresh_queues(state: State, target: Target, size: int | None = None) -> State:
    """As LAVIS starts them, of one random draw: features [d, Q] of length 1, and of nobody's images."""
    if not target.queue:
        return {}
    size = target.queue if size is None else size
    draw = torch.Generator().manual_seed(0)
    shape = len(state["text_proj.weight"]), size
    queues = {name: F.normalize(torch.randn(shape, generator=draw), dim=0) for name in ("image_queue", "text_queue")}
    keys = {"idx_queue": torch.full((1, size), -100)} if target.keyed else {}
    return {**queues, **keys, "queue_ptr": torch.zeros(1, dtype=torch.long)}


def summary(before: State, after: State, to: str) -> str:
    """One line: what was added to a checkpoint, what stays out, and what starts at random in LAVIS's class."""
    before, after = plain(before), {name.replace("text_encoder.bert.", "text_encoder.", 1): after[name] for name in after}
    found = [_by_part("added", [name for name in after if name not in before])]
    found.append(_by_part("left out", [name for name in before if name not in after]))
    new = [part for part in TARGETS[to].may_have if not any(_is_of(part, name) for name in after)] if to in TARGETS else []
    return "; ".join([*found, *([f"{', '.join(new)} starts as LAVIS's class makes it"] if new else [])])


def _by_part(what: str, names: Sequence[str]) -> str:
    """``23 weights added (visual_encoder_m 21, image_queue 2)``"""
    parts = Counter(name.split(".")[0] for name in names)
    return f"{len(names)} {what}" + (f" ({', '.join(f'{part} {count}' for part, count in parts.items())})" if names else "")


# --- transformers ------------------------------------------------------------------------------------------------------


def hf_names(state: State) -> State:
    """A plain BLIP by the names of transformers' BLIP: :func:`lavis_mafa.weights.lavis_names` read backwards."""
    found: State = {}
    for name, value in state.items():
        if name.startswith("visual_encoder."):
            name = name.removeprefix("visual_encoder.")
            name = name.replace("norm.", "post_layernorm.", 1) if name.startswith("norm.") else name
            for theirs, ours in VISION.items():
                name = name.replace(ours, theirs)
            name = f"vision_model.{name}"
        found[name] = value
    return found


def write_hf_blip(
    state: State, trained: dict[str, Any], folder: Path, source: str, tokenizer: str | None = None, image_size: int | None = None
) -> State:
    """A folder that transformers' ``BlipForImageTextRetrieval`` and ``AutoProcessor`` load by ``from_pretrained``.

    Args:
        trained: the ``model:`` block that it was trained by, which tells heads and words; empty: 64 numbers a head, as BLIP has.
        tokenizer: null: that of the block, or bert-base-uncased.
        image_size: as of :func:`exported`.

    Returns:
        the weights that were written, by LAVIS's names.

    Raises:
        UserError: the checkpoint is of another kind, or the tokenizer has other words.
    """
    _check_fits(state, HF_BLIP, source)
    state, parts = plain(state), (*ENCODERS, *HEADS)
    state = {name: value.float().contiguous().clone() for name, value in state.items() if any(_is_of(part, name) for part in parts)}
    if image_size is not None:
        state = at_image_size(state, image_size, source)
    words = build_blip_tokenizer(tokenizer or trained.get("tokenizer") or "bert-base-uncased")
    rows = len(state["text_encoder.embeddings.word_embeddings.weight"])
    if len(words) != rows:
        name = words.name_or_path or tokenizer
        raise UserError(
            f"{source} has embeddings of {rows} words, but --tokenizer ({name}) has {len(words)}, [DEC] and [ENC] included."
        )
    model = BlipForImageTextRetrieval(hf_config(state, trained, words, source))
    load_exactly(model, hf_names(state), source)
    size = model.config.vision_config.image_size
    images = BlipImageProcessor(size={"height": size, "width": size})
    with built_folder(folder) as partial:
        model.save_pretrained(partial, safe_serialization=True)
        BlipProcessor(images, words).save_pretrained(partial)
    return state


def hf_config(state: State, trained: dict[str, Any], words: Any, source: str) -> BlipConfig:
    """The sizes of a plain BLIP as transformers have them."""
    sizes, patch = sizes_of({name: list(value.shape) for name, value in state.items()}), "visual_encoder.patch_embed.proj.weight"

    def part(which: str, layers: int, inner: str) -> dict[str, Any]:
        width, heads = sizes[which]["width"], (trained.get(which) or {}).get("heads")
        if heads is None and width % 64:
            raise UserError(f"{source} does not tell how many heads its {which} of width {width} has; give a checkpoint of a run.")
        own = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads or width // 64}
        return {**own, "intermediate_size": len(state[inner])}

    vision = part("image_encoder", sizes["image_encoder"]["depth"], "visual_encoder.blocks.0.mlp.fc1.weight")
    text = part("text_encoder", sizes["text_encoder"]["layers"], "text_encoder.encoder.layer.0.intermediate.dense.weight")
    vision |= {"patch_size": state[patch].shape[-1], "image_size": image_size_of(state), "layer_norm_eps": EPSILON}
    text |= {"vocab_size": len(words), "bos_token_id": words.bos_token_id, "sep_token_id": words.sep_token_id}
    dim = len(state["text_proj.weight"])
    return BlipConfig(text_config=text, vision_config=vision, projection_dim=dim, image_text_hidden_size=dim)


def blip2_names(state: State) -> State:
    """A BLIP-2 of ours by the names of transformers: :func:`lavis_mafa.weights.lavis_names` read backwards.

    Keys of EVA's attention have no bias; there it is a part of one, of zeros. What transformers lacks (the head that writes captions
    in stage 1, the temperature) keeps its name.
    """
    found: State = {}
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
    of_text = {key: value for key, value in text.to_diff_dict().items() if key != "_name_or_path"} | {"model_type": "opt"}
    return {**config, "architectures": ["Blip2ForConditionalGeneration"], "text_config": of_text, "image_token_index": place}


def trained_by(path: Path, key: str) -> dict[str, Any]:
    """The ``model:`` block that a checkpoint of a run, or a shared folder, keeps beside its weights; empty where there is none."""
    if (shared := shared_model(path)) is not None:
        return shared
    config = read_checkpoint(weight_files(path, key)[0], key, names_only=True).get("config")
    block = config.get("model") if isinstance(config, dict) else None
    return block if isinstance(block, dict) else {}
