"""A YAML with its overrides and its model type's defaults, checked as far as that needs neither LAVIS nor data: forms, values, files,
and combinations of settings that are impossible.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from lavis_mafa.config.checkpoints import CLASSES, check_kinds, check_words, is_path
from lavis_mafa.config.data import SPLITS, check_block, check_info, check_processor, missing_files, own_splits
from lavis_mafa.config.read import at, expanded, find_yaml, merged, plain, read_settings
from lavis_mafa.config.schema import (
    DOWNSTREAM,
    MODEL_BLOCKS,
    MODEL_DEFAULTS,
    PATHS,
    RUN_BLOCKS,
    TRACKERS,
    TRUE_OR_FALSE,
    AlbefBlock,
    AlbefTaBlock,
    Blip2Block,
    Blip2OptBlock,
    CaptioningRun,
    GroundingRun,
    MafaBlock,
    RunBlock,
    VqaRun,
    con_d_block,
    loss_weights,
    model_types,
    type_defaults,
    typed_block,
)
from lavis_mafa.errors import Mistakes, UserError, did_you_mean
from lavis_mafa.named_weights import PREFIX, by_name, fetched, resumable
from lavis_mafa.weights import read_checkpoint

DATA_DEFAULTS = MODEL_DEFAULTS.parent / "datasets"
LAVIS_RUNNERS = ("runner_base", "runner_iter")
RESUME = "run.resume_ckpt_path"
_ENTAILING, _OF_TWO = ("albef_ve_mafa", "albef_classification"), ("albef_nlvr_mafa",)
# data sets whose sentences have labels -> the models that tell these
LABELLED = {"grit_entailment": _ENTAILING, "snli_ve": _ENTAILING, "grit_statements": _OF_TWO, "nlvr": _OF_TWO}
ANSWERING = ("mafa_vqa", "mafa_gqa")
TASKS_OF = {**dict.fromkeys(CLASSES, ("mafa_classification",)), "albef_vqa_mafa": ANSWERING}  # of models that do nothing else
# how models answer, by themselves first; others generate
INFERENCES = {"albef_vqa_mafa": ("rank", "generate"), "albef_vqa": ("rank",), "blip_vqa": ("rank", "generate")}
OF_GENERATING = ("num_beams", "max_len", "min_len", "length_penalty", "prompt")
OURS, STEPWISE = "warmup_cosine_per_step", "linear_warmup_step_lr"
NO_DECAY = f"run.lr_sched is {STEPWISE}, but run.lr_decay_rate is null; set the factor of an epoch (LAVIS's ALBEF: 0.9)."


@dataclass
class Checked:
    """A YAML that was checked. Everything that runs it takes its settings from here."""

    config: DictConfig  # the model type's defaults, then the file, then the overrides
    model: Any  # the typed block; None for one of LAVIS's models
    run: RunBlock | None  # None for one of LAVIS's tasks
    readable: bool = True  # its data sets have the right form


def check_yaml(name: str, options: list[str], files: bool = True) -> DictConfig:
    """Read a YAML with overrides and check all that can be checked without LAVIS and data: the merged configuration.

    Args:
        name: a file, or the name of a shipped YAML.
        options: KEY=VALUE overrides.
        files: False leaves out what this machine must have: checkpoints that are not named yet, or not there.

    Raises:
        UserError: a mistake; its ``messages`` are all of them.
    """
    checked, found = examine(name, options, files)
    found.end()
    return checked.config


def examine(name: str, options: list[str], files: bool = True) -> tuple[Checked, Mistakes]:
    """The same with the typed blocks, and with all mistakes.

    Raises:
        UserError: there is no such file, or it has not the form of a configuration.
    """
    _check_environment()
    path = find_yaml(name)
    settings, found = read_settings(path, options), Mistakes(f" ({path})")
    found(_check_form, settings)
    found.end()
    found(expand_settings, settings)
    own, run, datasets = settings["model"], settings["run"], settings["datasets"]
    data = {key: found(_data_set, key, block) for key, block in datasets.items()}
    for key in settings:
        if key not in ("model", "datasets", "run", "preprocess"):
            found.add(f"{key} is not a block.{did_you_mean(str(key), ('model', 'datasets', 'run'))} Allowed: model, datasets, run.")
    if not isinstance(settings.get("preprocess", {}), dict):
        found.add(f"preprocess is {settings.pop('preprocess')!r}, but must be a block of settings.")
    model = None
    if own["arch"] in MODEL_BLOCKS:
        if run.get("evaluate") is True:
            own |= _without_judge_and_teacher(own)
        if "model_type" not in own:
            found.add(f"model.model_type is None, but {own['arch']} has: {', '.join(model_types(own['arch']))}.")
        model = found(typed_block, "model", own)
        if own.get("model_type") in model_types(own["arch"]):
            settings = merged(type_defaults(own["arch"], own["model_type"]), settings)
    typed_run, before = None, len(found.messages)
    if run["task"] in RUN_BLOCKS:
        typed_run = found(typed_block, "run", run)
    else:  # of LAVIS's tasks the keys that we know; YAMLs of theirs say `amp` and more beside them
        known = RunBlock.__dataclass_fields__.keys() - {"grit", "task"}
        found(typed_block, "run", {key: value for key, value in run.items() if key in known})
        found(_raise, _lavis_run(run))
    if len(found.messages) == before:  # what was refused, or stands for it, is no setting to combine
        found(check_combinations, model, typed_run, files)
        if None not in data.values():
            found(check_splits, settings)
        if model is not None and typed_run is None:  # one of LAVIS's tasks, whose other keys are LAVIS's
            found(check_device, model, str(run.get("device", "cuda")))
            found(_raise, _checkpoints(model, run.get("evaluate") is True) if files else ())
    found(_raise, _labels(run["task"], own["arch"], datasets))
    found(_raise, _questions(run["task"], datasets))
    found(_raise, _boxes(run["task"], own["arch"], datasets))
    if model is not None:
        found(_raise, _image_sizes(model, {key: block if files else datasets[key] for key, block in data.items() if block}, run))
    if files:
        _check_files(settings, model, found)
    return Checked(OmegaConf.create(settings), model, typed_run, None not in data.values()), found


def check_lavis(config: DictConfig) -> Checked:
    """The same of the configuration that LAVIS's own train.py and evaluate.py made, which come here without our command line.

    Raises:
        UserError: a mistake.
    """
    expand_settings(config)
    fetch_named(config, judges=not config.run.get("evaluate", False))
    run, own = typed_block("run", config.run), plain(config.model)
    own |= _without_judge_and_teacher(own) if run.evaluate else {}
    model = typed_block("model", own) if own["arch"] in MODEL_BLOCKS else None
    check_combinations(model, run)
    _raise(_trackers(config.run))
    _raise(_labels(run.task, own["arch"], config.get("datasets") or {}))
    _raise(_questions(run.task, config.get("datasets") or {}))
    _raise(_boxes(run.task, own["arch"], config.get("datasets") or {}))
    if model is not None:
        check_kinds(model, evaluate=run.evaluate and run.task != "mafa_captioning")
    return Checked(config, model, run)


def _without_judge_and_teacher(own: dict[str, Any]) -> dict[str, Any]:
    """What to set in the ``model`` block of an evaluation, which needs neither a Con-D nor a language teacher, nor their files."""
    off: dict[str, Any] = {"language_teacher": None} if "language_teacher" in own else {}
    if own["arch"] not in ("blip2_opt_mafa", *DOWNSTREAM) and isinstance(own.get("ecm", {}), dict):
        off["ecm"] = {**own.get("ecm", {}), "enabled": False}
    for part, values in (("mlm", {"cross_distillation": 0.0, "temperature": 1.0}), ("itm", {"synthetic": None})):
        if isinstance(own.get(part), dict):
            off[part] = {key: values.get(key, value) for key, value in own[part].items()}
    return off


def _raise(messages: Iterator[str] | Sequence[str]) -> None:
    if found := list(messages):
        raise UserError(*found)


# --- forms -------------------------------------------------------------------------------------------------------------


def _check_environment() -> None:
    """LAVIS and transformers leave it to torch whether a checkpoint may run code; ours never may."""
    name = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    if os.environ.get(name, "0").lower() in ("1", "y", "yes", "true"):
        raise UserError(
            f"{name} is {os.environ[name]} in the environment, which lets checkpoints run code as they are loaded; unset it."
        )


def _check_form(settings: dict[str, Any]) -> None:
    """The three blocks, and the two names on which all else depends; raises UserError."""
    found = Mistakes()
    for block in ("model", "datasets", "run"):
        if settings.get(block) is None:
            found.add(f"{block} is missing; a YAML has the blocks model, datasets and run.")
        elif not isinstance(settings[block], dict):
            found.add(f"{block} is {settings[block]!r}, but must be a block of settings.")
    found.end()
    if not settings["datasets"]:
        found.add("datasets is empty; name at least one, such as grit_pairs or grit_emoji.")
    for block, key, example in (("model", "arch", "albef_mafa"), ("run", "task", "mafa_pretrain")):
        if not isinstance(settings[block].get(key), str):
            found.add(f"{block}.{key} is {settings[block].get(key)}; allowed: a registered name, such as {example}.")
    found.end()


def expand_settings(config: Any) -> None:
    """Replace ``~`` and environment variables in all paths of a configuration, names of weights that come with the package, and a run's
    folder by its checkpoint; raises UserError."""
    found = Mistakes()
    for key in PATHS:
        parent, _, last = key.rpartition(".")
        block = at(config, parent)
        if isinstance(block, dict | DictConfig) and isinstance(block.get(last), str):
            path = found(expanded, block[last], key) or block[last]
            if PATHS[key] == "weights":
                path = found(by_name, path, key) or path
            elif key == RESUME:
                path = found(resumable, path, key) or path
            block[last] = path
    datasets = config.get("datasets")
    for key in map("{}.build_info".format, datasets if isinstance(datasets, dict | DictConfig) else ()):
        _expand_all(at(datasets, key), f"datasets.{key}", found)
    found.end()


def fetch_named(config: Any, judges: bool = True) -> list[str]:
    """Download weights that a configuration names as ``lavis:ARCH/TYPE`` and set their files; what was set, as overrides.

    ``judges``: Con-D is asked. Raises UserError: a download fails.
    """
    options = []
    for key in (key for key, kind in PATHS.items() if kind == "weights" and (judges or not key.startswith("model.discriminator."))):
        if isinstance(name := at(config, key), str) and name.startswith(PREFIX):
            parent, _, last = key.rpartition(".")
            at(config, parent)[last] = fetched(name, key)
            options.append(f"{key}={json.dumps(at(config, key))}")
    return options


def _expand_all(node: Any, key: str, found: Mistakes) -> None:
    is_list = isinstance(node, list | ListConfig)
    for item in range(len(node)) if is_list else list(node) if isinstance(node, dict | DictConfig) else ():
        if isinstance(node[item], str):
            node[item] = found(expanded, node[item], f"{key}.{item}") or node[item]
        else:
            _expand_all(node[item], f"{key}.{item}", found)


def _data_set(name: Any, block: Any) -> dict[str, Any]:
    """The checked block, one of ours with its defaults; of LAVIS's the form alone, whose defaults are not read yet."""
    where, found = f"datasets.{name}", Mistakes()
    if not isinstance(name, str) or not name.isidentifier():
        raise UserError(f"{where} is no name of a data set; it is a word, such as grit_pairs or grit_emoji.")
    _must_be_block(where, block)
    for part in ("build_info", "vis_processor", "text_processor"):
        if part in block:
            found(_must_be_block, f"{where}.{part}", block[part])
    found.end()
    found(check_block, name, block)
    if name in SPLITS:
        found(check_info, name, block.get("build_info", {}))
        found.end()
        block = merged(_defaults(name), block)
    else:
        _check_lavis_form(where, block, found)
    for part in ("vis_processor", "text_processor"):
        for mode, processor in block.get(part, {}).items():
            if found(_must_be_block, f"{where}.{part}.{mode}", processor) and (name in SPLITS or "name" in processor):
                found(check_processor, f"{where}.{part}.{mode}", processor)
    found.end()
    checked: dict[str, Any] = block
    return checked


def _must_be_block(key: str, value: Any) -> bool:
    if not isinstance(value, dict):
        raise UserError(f"{key} is {value!r}, but must be a block of settings.")
    return True


def _defaults(name: str) -> Any:
    return plain(OmegaConf.load(DATA_DEFAULTS / name / "defaults.yaml"))["datasets"][name]


def _check_lavis_form(where: str, block: dict[str, Any], found: Mistakes) -> None:
    """The form of what LAVIS's builders read."""
    if not isinstance(block.get("type", "default"), str):
        found.add(f"{where}.type is {block['type']!r}, but must be a text: which of its default configurations.")
    info, key = block.get("build_info", {}), f"{where}.build_info"
    parts = {f"{key}.{part}": info[part] for part in ("annotations", "images") if part in info}
    if isinstance(info.get("annotations"), dict):
        parts |= {f"{key}.annotations.{split}": of_split for split, of_split in info["annotations"].items()}
    for part, files in parts.items():
        if not found(_must_be_block, part, files) or part.endswith(".annotations"):
            continue
        for kind in ("url", "storage"):
            texts = files.get(kind) if isinstance(files.get(kind), list) else [files.get(kind) or ""]
            if not all(isinstance(text, str) for text in texts):
                found.add(f"{part}.{kind} is {files[kind]!r}, but must be a path or a list of paths.")


# --- files -------------------------------------------------------------------------------------------------------------


def _check_files(settings: dict[str, Any], model: Any, found: Mistakes) -> None:
    """Whatever this machine must have: a folder to write in, checkpoints of the right kind, annotations, image folders."""
    run, lavis = settings["run"], settings["model"]["arch"] not in MODEL_BLOCKS  # LAVIS's models take URLs, ours local files alone
    folder = Path(str(run.get("output_dir") or RunBlock().output_dir)).absolute()
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        reason = "that is not a folder" if not nearest.is_dir() else "the right to write there is missing"
        found.add(f"run.output_dir: cannot write in {folder}: {nearest}: {reason}.")
    found(_raise, _trackers(run))
    absent = {key for key, kind in PATHS.items() if not _is_there(key, kind, at(settings, key), lavis, found)}
    if model is not None:
        found(check_words, model)
        silent = run.get("evaluate") is True and run["task"] != "mafa_captioning"  # asks no language head
        found(check_kinds, model, absent, silent)
    wanted = [RESUME]
    if lavis:  # which answers a file that it cannot load with a traceback
        wanted.append("model.finetuned" if settings["model"].get("load_finetuned", True) else "model.pretrained")
    for key in wanted:
        value = at(settings, key)
        if not isinstance(value, str) or "://" in value or (key, value) == (RESUME, "auto") or key in absent:
            continue
        if value.endswith(".safetensors"):
            found.add(f"{key} is {value!r}, but must be a .pth file: safetensors hold weights alone.")
        else:
            found(read_checkpoint, value, key, names_only=True)
    for name, block in settings["datasets"].items():
        if name in SPLITS and isinstance(block, dict) and isinstance(block.get("build_info", {}), dict):
            found(_check_data_files, name, block.get("build_info", {}))


def _trackers(run: Any) -> Iterator[str]:
    """Those of a training that are not installed. A folder of the same name, as W&B makes them, is no package."""
    for name in () if run.get("evaluate") is True else run.get("trackers") or ():
        spec = importlib.util.find_spec(name) if name in TRACKERS else None
        if name in TRACKERS and (spec is None or spec.origin is None):
            yield f"run.trackers has {name}, which is not installed; pip install {TRACKERS[name]}, or leave it out."


def _is_there(key: str, kind: str, value: Any, lavis: bool, found: Mistakes) -> bool:
    """Whether what a setting names is there, as far as that can be said: a hub name may be."""
    if value is None or kind == "folder" or key == "model.finetuned" or (key, value) == (RESUME, "auto"):
        return True
    if kind == "name":
        if isinstance(value, str) and is_path(value) and not Path(value).exists():
            found.add(f"{key} is {value!r}, but there is no such file or folder.")
        return True
    if not isinstance(value, str):
        found.add(f"{key} is {value!r}, but must be the path of a file.")
        return False
    if kind == "weights" and value.startswith(PREFIX):  # a job downloads it before it starts
        return False
    there = Path(value).exists() if kind == "weights" and not lavis else Path(value).is_file()
    if not there and not (lavis and "://" in value):
        found.add(f"{key} is {value!r}, but there is no such file.{' Download it first.' if '://' in value else ''}")
        return False
    return True


def _check_data_files(name: str, info: dict[str, Any]) -> None:
    """Annotation files and image folders of a data set of ours; of LAVIS's, whose defaults name theirs, see ``job``."""
    check_info(name, info)
    _raise(missing_files(name, merged(_defaults(name), {"build_info": info})))


# --- combinations ------------------------------------------------------------------------------------------------------


def check_combinations(model: Any, run: RunBlock | None, files: bool = True) -> None:
    """Settings that are fine alone but impossible together.

    Args:
        model: one of the typed model blocks; None for LAVIS's own models.
        run: None for LAVIS's own tasks.
        files: False leaves out the checkpoints that only the user can name (a YAML is shipped without them).

    Raises:
        UserError: all that were found.
    """
    found = Mistakes()
    found(_raise, [] if model is None else _sizes(model, "model"))
    if isinstance(model, MafaBlock):
        found(_raise, _mafa(model))
        if model.discriminator is not None and model.discriminator.arch != "ground_truth":
            con_d = found(con_d_block, model)
            if con_d is not None and not list(_sizes(model, "model")):  # else Con-D has the model's mistakes
                found(_raise, _sizes(con_d, "model.discriminator"))
    if run is not None:
        if run.compile and model is None:
            found.add("run.compile is true, but a model of LAVIS's has no part that is compiled; allowed: false.")
        found(check_device, model, run.device, run.precision)
        if model is not None:
            wrong = list(_tasks(model, run))
            found(_raise, wrong)
            if isinstance(run, VqaRun) and not wrong:
                found(inference_of, model.arch, run)
            found(_raise, _grounding(model, run) if isinstance(run, GroundingRun) else ())
            found(_raise, _checkpoints(model, run.evaluate) if files else ())
        found(_raise, _grit(run) if run.grit.enabled else ())
        found(_raise, _runs(run))
    found.end()


def _sizes(model: Any, shown: str) -> Iterator[str]:
    """Widths that heads divide, images that patches divide, layers of both kinds, and patches left out in training alone."""
    for name in (f.name for f in dataclasses.fields(model) if dataclasses.is_dataclass(getattr(model, f.name))):
        part, key = getattr(model, name), f"{shown}.{name}"
        if hasattr(part, "heads") and part.width % part.heads:
            yield f"{key}.width is {part.width}, but must be a multiple of heads ({part.heads})."
        if hasattr(part, "patch_size") and part.image_size % part.patch_size:
            where = "model.discriminator.image_size" if shown == "model.discriminator" else f"{key}.image_size"
            yield f"{where} is {part.image_size}, but must be a multiple of patch_size ({part.patch_size})."
        if getattr(part, "drop_patches", 0) and (shown != "model" or getattr(part, "freeze", False)):
            who = "a frozen ViT" if shown == "model" else "Con-D"
            yield f"{key}.drop_patches is {part.drop_patches:g}, but {who} always sees whole images; allowed here: 0."
        if hasattr(part, "fusion_layer") and not 0 < part.fusion_layer < part.layers:
            yield f"{key}.fusion_layer is {part.fusion_layer}, but must lie between 1 and layers - 1 ({part.layers - 1})."
        if getattr(part, "freeze", None) is False and part.precision != "fp32":
            yield (
                f"{key}.precision is {part.precision}, but with freeze: false its weights must be fp32; "
                "run.precision: bf16 or fp16 computes in less all the same."
            )


def _mafa(model: MafaBlock) -> Iterator[str]:
    """Losses, their teacher, ECM and its Con-D: a loss to train with, and something to do for what is asked of the others."""
    weights, ecm, teacher = loss_weights(model), model.ecm, model.itc.momentum_distillation
    keys = [f"model.{name}.weight" for name in weights]
    if isinstance(model, AlbefBlock) and model.mlm.weight and not model.mlm.mask_probability:
        keys[2] = "model.mlm.mask_probability"
    off = {loss: "" if weights[name] else f"{key} is 0" for loss, name, key in zip(("itc", "itm", "lm"), weights, keys, strict=True)}
    if off["itm"] and model.itm.weight:
        off["itm"] = "model.itm.negatives is none"
    if ecm.false_negatives == "eliminate":
        off["lm"] = off["lm"] or "false_negatives: eliminate adds no pairs to lm"
    of_words = getattr(teacher, "mlm", False)  # ALBEF's alone has this switch
    if not any(weights.values()):
        yield f"{', '.join(off.values())}, so there is nothing to train; switch one of them on."
    elif ecm.enabled and ecm.use_in and all(off[loss] for loss in ecm.use_in):
        yield (
            f"model.ecm.use_in is [{', '.join(ecm.use_in)}], but {' and '.join(off[loss] for loss in ecm.use_in)}, so ECM would change "
            "nothing; name a loss that is on, or set ecm.enabled: false."
        )
    elif teacher and model.arch != "blip2_mafa" and not weights["itc"] and not (of_words and weights["mlm"]):
        what = f"{keys[0]} and {keys[2]} are" if of_words else f"{keys[0]} is"
        yield f"model.itc.momentum_distillation is set, but {what} 0, so its teacher would teach nothing; allowed here: null."
    yield from _language_teacher(model, weights)
    yield from _soft_masks(model, weights)
    if inside := getattr(model.itc, "intra_modal", []):
        missing = [] if teacher else ["model.itc.momentum_distillation is null, whose encoders make its keys"]
        missing += [] if weights["itc"] else [f"{keys[0]} is 0, so it would change nothing"]
        if missing:
            yield f"model.itc.intra_modal is [{', '.join(inside)}], but {' and '.join(missing)}; allowed then: []."
    if ecm.ambiguous_from > ecm.threshold:
        yield (
            f"model.ecm.ambiguous_from is {ecm.ambiguous_from}, but must not exceed threshold ({ecm.threshold}); "
            "equal switches the ambiguous class off."
        )
    if model.arch == "blip2_mafa" and teacher is not None:
        yield "model.itc.momentum_distillation is set, but blip2_mafa has no momentum teacher; allowed: null."
    if ecm.enabled and model.discriminator is None:
        yield (
            f"model.ecm.enabled is true, but there is no model.discriminator (Con-D); give {{arch: {model.arch}, checkpoint: PATH}} "
            "or set ecm.enabled: false."
        )


def _language_teacher(model: Any, weights: dict[str, float]) -> Iterator[str]:
    """ViLTA's: something to teach, one teacher a prediction, and somebody who knows which words fit."""
    masks, momentum, synthetic = isinstance(model, AlbefBlock), model.itc.momentum_distillation, model.itm.synthetic
    share, temperature = (model.mlm.cross_distillation, model.mlm.temperature) if masks else (0.0, 1.0)
    key, by_teacher = "model.mlm.cross_distillation", synthetic is not None and synthetic.generator == "teacher"
    if (share or by_teacher) and model.language_teacher is None:
        asks = f"{key} is {share}" if share else "model.itm.synthetic.generator is teacher"
        yield (
            f"{asks}, but there is no model.language_teacher; give {{init: bert-base-uncased}}, or a folder that "
            "`lavis-mafa train-teacher` made."
        )
    if share and not weights["mlm"]:
        yield f"{key} is {share}, but masked language modelling is off, which it is a part of; allowed here: 0."
    if share and momentum is not None and momentum.mlm and momentum.alpha:
        yield (
            f"{key} is {share}, but model.itc.momentum_distillation.mlm is true, and one prediction has one teacher; set "
            "momentum_distillation.mlm: false, or cross_distillation: 0."
        )
    if model.language_teacher is not None and not share and not by_teacher:
        asks = f"{key} is 0 and nothing else asks it; set that (ViLTA: 0.5) or" if masks else "nothing asks it; set"
        yield f"model.language_teacher is set, but {asks} model.itm.synthetic, or leave the teacher out."
    if temperature != 1 and not share:
        yield f"model.mlm.temperature is {temperature}, but is cross_distillation's alone, which is 0; allowed here: 1."
    if synthetic is not None and not weights["itm"]:
        yield "model.itm.synthetic is set, but matching, whose negatives they are, is off; allowed here: null."
    if synthetic is not None and not by_teacher and not masks:
        yield (
            f"model.itm.synthetic.generator is model, but {model.arch} predicts no masked words, so that it knows none that fit; "
            "allowed here: teacher."
        )
    elif synthetic is not None and not by_teacher and not weights["mlm"]:
        yield (
            "model.itm.synthetic.generator is model, but masked language modelling is off, so nothing trains the head that it asks; "
            "allowed here: teacher."
        )


def _soft_masks(model: Any, weights: dict[str, float]) -> Iterator[str]:
    """SoftMask's: a matching score, from a layer whose every word reaches it; words that are masked, and losses that are on."""
    if getattr(getattr(model, "mlm", None), "mask_everywhere", False) and not weights["mlm"]:
        yield "model.mlm.mask_everywhere is true, but masked language modelling, whose masks they are, is off; allowed here: false."
    elif getattr(getattr(model, "mlm", None), "mask_everywhere", False) and not weights["itc"] and not weights["itm"]:
        yield "model.mlm.mask_everywhere is true, but ITC and ITM, which would read masked texts, are off; allowed here: false."
    if model.itc.focal and not weights["itc"]:
        yield f"model.itc.focal is {model.itc.focal:g}, but ITC, whose power it is, is off; allowed here: 0."
    how = getattr(model.itm, "soft_mask", None)
    if how is None:
        return
    if not weights["itm"]:
        yield "model.itm.soft_mask is set, but matching, whose positives they are, is off; allowed here: null."
    layers = model.text_encoder.layers - getattr(model.text_encoder, "fusion_layer", 0)
    if layers < 2 or (how.layer or 1) >= layers:
        allowed = f"a number below {layers}, or null" if layers > 1 else "soft_mask: null"
        yield (
            f"model.itm.soft_mask.layer is {how.layer}, of {layers} layers that look at images; from the last one no word's own map "
            f"reaches the score. Allowed: {allowed}."
        )


def _runs(run: RunBlock) -> Iterator[str]:
    """A runner that can run our tasks, and settings that all have an effect: accepted means applied."""
    if run.runner in LAVIS_RUNNERS:
        yield f"run.runner is {run.runner}, which cannot run {run.task}; allowed: runner_mafa."
    if run.lr_sched == STEPWISE and run.lr_decay_rate is None:
        yield NO_DECAY
    if run.lr_sched in (OURS, "linear_warmup_cosine_lr") and run.lr_decay_rate is not None:
        yield f"run.lr_decay_rate is {run.lr_decay_rate:g}, but {run.lr_sched} has no use for it; allowed: null."
    if run.lr_sched == STEPWISE and run.lr_horizon_epochs is not None:
        yield f"run.lr_horizon_epochs is {run.lr_horizon_epochs}, but {run.lr_sched} has no use for it; allowed: null."
    if isinstance(run, VqaRun) and run.prompt.count("{}") != 1:
        yield f"run.prompt is {run.prompt!r}, but must have one {{}} for the question: 'Question: {{}} Answer:'."
    if isinstance(run, CaptioningRun | VqaRun) and run.min_len > run.max_len:
        yield f"run.min_len is {run.min_len}, but must not exceed max_len ({run.max_len})."
    if run.task == "mafa_pretrain":
        if run.k_test == 0 and run.rank_by not in (None, "itc"):
            yield f"run.k_test is 0, so that the cosine alone ranks, but run.rank_by is {run.rank_by}; allowed then: itc, or null."
        if run.use_dist_eval_sampler:
            yield f"run.use_dist_eval_sampler is true, but {run.task} shares the rows itself; allowed: false."
        return
    trains_pairs = isinstance(run, GroundingRun)  # with Con-D too, whose verdicts are recorded
    for name in ("k_test", "rank_by", "coco_captions", *(() if trains_pairs else ("record_connections",))):
        if (value := getattr(run, name)) != getattr(RunBlock, name):
            yield f"run.{name} is {value!r}, but {run.task} has no use for it; leave it out."
    if run.grit.enabled:
        yield f"run.grit.enabled is true, but {run.task} has no use for it; allowed: false."


def _grit(run: RunBlock) -> Iterator[str]:
    """B <= M <= L and M divides L."""
    queue, space, batch = run.grit.queue_size, run.grit.search_space, run.batch_size_train
    if space > queue:
        yield f"run.grit.search_space is {space}, but must not exceed queue_size ({queue})."
    elif batch > space:
        yield f"run.batch_size_train is {batch}, but must not exceed run.grit.search_space ({space})."
    elif queue % space:
        # from M outwards, below M first; a queue whose divisors are all far away has itself
        near = (d for gap in range(1, 10_000) for d in (space - gap, space + gap))
        nearest = next((d for d in near if batch <= d <= queue and queue % d == 0), queue)
        yield f"run.grit.search_space is {space}, but must divide queue_size ({queue}); nearest: {nearest}."


def _tasks(model: Any, run: RunBlock) -> Iterator[str]:
    """Tasks that a model cannot do."""
    stage_2, pretrains = isinstance(model, Blip2OptBlock), run.task in ("mafa_pretrain", "mafa_grounding")
    only = TASKS_OF.get(model.arch, ())
    able = [arch for arch, tasks in TASKS_OF.items() if run.task in tasks] + ["blip2_opt_mafa"] * (run.task in ANSWERING)
    if only and run.task not in only:
        yield f"run.task is {run.task}, but model.arch is {model.arch}; allowed here: run.task: {' or '.join(only)}."
        return
    if able and model.arch not in able:
        yield f"run.task is {run.task}, but model.arch is {model.arch}; allowed here: model.arch: {' or '.join(able)}."
        return
    if run.task == "mafa_captioning" and model.arch not in ("blip2_mafa", "blip2_opt_mafa"):
        yield f"run.task is {run.task}, but {model.arch} writes no captions; allowed: blip2_mafa, blip2_opt_mafa."
    elif run.task == "mafa_captioning" and not stage_2 and not run.evaluate:
        yield f"run.task is {run.task}, which trains stage 2 alone; {model.arch} is trained by mafa_pretrain."
    if isinstance(model, AlbefTaBlock) and pretrains:
        yield from _text_assignment(run)
    if stage_2 and run.grit.enabled and pretrains:
        yield f"run.grit.enabled is true, but {model.arch} has no contrastive features to group by; GRIT belongs to stage 1."
    if stage_2 and not run.evaluate and model.language_model.precision == "fp16" and run.precision != "fp16":
        yield (
            f"run.precision is {run.precision}, but model.language_model.precision is fp16, whose gradients vanish without the loss "
            "scaling of run.precision: fp16; set that, or model.language_model.precision: bf16."
        )
    if stage_2 and pretrains and (run.valid_splits or run.test_splits):
        yield (
            f"run.task is mafa_pretrain, which evaluates retrieval, but {model.arch} has no matching head; leave valid_splits and "
            "test_splits empty, and evaluate with mafa_captioning or mafa_vqa."
        )
    smoothed = isinstance(model, MafaBlock) and model.itc.weight and model.itc.smooth_when == "grouped" and model.itc.smoothing > 0
    if smoothed and not run.grit.enabled and not run.evaluate and pretrains:
        yield (
            f"model.itc.smoothing is {model.itc.smoothing} with smooth_when: grouped, but run.grit.enabled is false, so it "
            "would never start; set smoothing: 0 or smooth_when: always."
        )


def _text_assignment(run: RunBlock) -> Iterator[str]:
    """It makes no features to group by, scores nothing, and draws two other images for each text."""
    if run.grit.enabled:
        yield "run.grit.enabled is true, but albef_ta_mafa makes no features of texts to group by; allowed here: false."
    if run.evaluate or run.valid_splits or run.test_splits:
        yield (
            "run.task is mafa_pretrain, which evaluates retrieval, but albef_ta_mafa is for training alone; leave run.valid_splits and "
            "run.test_splits empty, and train albef_nlvr_mafa on its checkpoint."
        )
    if run.batch_size_train < 3:
        size = run.batch_size_train
        yield f"run.batch_size_train is {size}, but text assignment draws two other images for each text; allowed: 3 or more."


def inference_of(arch: str, run: VqaRun, listed: bool = True) -> str:
    """``rank`` or ``generate``: what ``run.inference`` says, or the model does by itself.

    Args:
        listed: there are answers to rank.

    Raises:
        UserError: the model cannot, or settings are for the other way.
    """
    can = INFERENCES.get(arch, ("generate",))
    how = run.inference or (can[0] if listed else can[-1] if arch == "blip_vqa" else can[0])
    if how not in can:
        raise UserError(f"run.inference is {how}, but {arch} cannot; allowed here: {', '.join(can)}.")
    fields, ranks = VqaRun.__dataclass_fields__, how == "rank"
    unused = list(OF_GENERATING if ranks else ("answer_list", "num_ans_candidates"))
    if not ranks and arch == "albef_vqa_mafa":  # word by word, with no prompt
        unused += ["prompt", "length_penalty"]
        if run.num_beams != 1:
            raise UserError(f"run.num_beams is {run.num_beams}, but {arch} generates without beams; allowed: 1.")
    found = [name for name in unused if getattr(run, name) != fields[name].default]
    _raise([f"run.{name} is {getattr(run, name)!r}, but has no use where run.inference is {how}; leave it out." for name in found])
    return how


def _questions(task: str, datasets: Mapping[str, Any]) -> Iterator[str]:
    """Questions with answers are for the tasks that answer them: a question describes no image."""
    if task in (*ANSWERING, "vqa", "gqa", "aok_vqa"):
        datasets = {} if task in ANSWERING else datasets
    elif "grit_vqa" in datasets:
        yield f"grit_vqa has questions with answers, but run.task is {task}; allowed here: {', '.join(ANSWERING)}."
    if at(datasets, "vg_vqa.build_info.answer_weight") is not None:
        yield f"datasets.vg_vqa.build_info.answer_weight is set, but {task} does not know it; allowed here: {', '.join(ANSWERING)}."


def _labels(task: str, arch: str, datasets: Mapping[str, Any]) -> Iterator[str]:
    """Sentences with labels are for the task and the models that learn and tell these, and those can do nothing with others."""
    ours, telling = task == "mafa_classification", list(dict.fromkeys(one for models in LABELLED.values() for one in models))
    own = [name for name, models in LABELLED.items() if arch in models]
    if ours and arch not in MODEL_BLOCKS and not own:
        yield f"run.task is {task}, but model.arch is {arch}; allowed here: {', '.join(telling)}."
    for name in datasets:
        if ours and name not in (own or LABELLED):
            what = "sentences with labels" if name not in LABELLED else f"labels that {arch} tells"
            yield f"run.task is {task}, but {name} has no {what}; allowed here: {', '.join(own or LABELLED)}."
        if not ours and arch not in CLASSES and (name in LABELLED and (name in SPLITS or task in RUN_BLOCKS)):
            yield f"{name} has sentences that may be false, with labels, but run.task is {task}; allowed here: mafa_classification."


def _boxes(task: str, arch: str, datasets: Mapping[str, Any]) -> Iterator[str]:
    """Boxes are for the task that finds them, and it can evaluate nothing else."""
    if task == "mafa_grounding" and arch not in MODEL_BLOCKS:
        yield f"run.task is {task}, but model.arch is {arch}; allowed here: albef_mafa, blip_mafa."
    for name in datasets:
        if task == "mafa_grounding" and name != "grit_boxes":
            yield f"run.task is {task}, but {name} has no boxes; allowed here: grit_boxes."
        if task != "mafa_grounding" and name == "grit_boxes":
            yield f"grit_boxes has boxes that a text means, but run.task is {task}; allowed here: mafa_grounding."


def _grounding(model: Any, run: GroundingRun) -> Iterator[str]:
    """A model whose words look at patches, and a layer whose maps are there."""
    if not isinstance(model, MafaBlock) or isinstance(model, Blip2Block):
        yield f"run.task is {run.task}, but model.arch is {model.arch}; allowed here: albef_mafa, blip_mafa."
        return
    weights, layers = loss_weights(model), model.text_encoder.layers - getattr(model.text_encoder, "fusion_layer", 0)  # type: ignore
    if not weights[run.heat]:
        yield f"run.heat is {run.heat}, but model.{run.heat} is off, so that score is not trained; switch it on, or take the other."
    if run.heat == "itc" and run.layer is not None:
        yield f"run.layer is {run.layer}, but run.heat: itc reads the image encoder's last block; allowed then: null."
    if run.heat == "itm" and (layers < 2 or (run.layer or 1) >= layers):
        allowed = f"a number below {layers}, or null" if layers > 1 else "heat: itc"
        yield (
            f"run.layer is {run.layer}, of {layers} layers that look at images; from the last one no word's own map reaches the score. "
            f"Allowed: {allowed}."
        )


def _checkpoints(model: Any, evaluate: bool) -> Iterator[str]:
    """The checkpoints that a job cannot do without are named."""
    con_d = getattr(model, "discriminator", None)
    if con_d is not None and con_d.arch != "ground_truth" and not con_d.checkpoint and model.ecm.enabled:
        yield (
            "model.discriminator.checkpoint is null; an untrained Con-D is never used. "
            f"Set it to the file of a trained {con_d.arch}, a run's folder or a name such as lavis:albef_retrieval/coco "
            "(--options model.discriminator.checkpoint=PATH)."
        )
    if evaluate and not model.pretrained:
        yield (
            "model.pretrained is null, but run.evaluate is true, and an untrained model is not worth evaluating. "
            "Set it to the checkpoint to evaluate (--options model.pretrained=PATH)."
        )
    if isinstance(model, Blip2OptBlock) and not model.pretrained and not model.stage_1:
        yield (
            "model.stage_1 is null; stage 2 starts from a stage-1 checkpoint. "
            "Set it (--options model.stage_1=PATH), or model.pretrained to a stage-2 checkpoint."
        )


def check_device(model: Any, device: str, precision: str = "fp32") -> None:
    """A device that there is, and what a CPU cannot compute in; raises UserError."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"run.device is {device!r}, but only cpu and cuda are supported; allowed: cpu, cuda or cuda:0, cuda:1, ...")
    if device != "cpu":
        return
    parts = {"model": model}
    con_d = getattr(model, "discriminator", None)
    if con_d is not None and con_d.arch != "ground_truth" and model.ecm.enabled:
        parts["model.discriminator"] = con_d_block(model)
    asked = {"run.precision": precision}
    for shown, block in parts.items():
        for part in ("image_encoder", "language_model"):
            asked[f"{shown}.{part}.precision"] = getattr(getattr(block, part, None), "precision", "fp32")
    for key, value in asked.items():
        if value == "fp16":
            raise UserError(f"{key} is fp16, but run.device is cpu; allowed there: fp32, bf16.")


def doubtful(model: Any, run: RunBlock) -> Iterator[str]:
    """What a user may want (a paper's table has it), but should know of."""
    if model.arch in DOWNSTREAM and model.pretrained is None and not run.evaluate:
        yield "model.pretrained is null, so its encoders start at random, or from model.*.init; give a checkpoint of pre-training."
    if not isinstance(model, MafaBlock) or run.evaluate:
        return
    matches = loss_weights(model)["itm"]
    chosen = [f"model.itm.negatives: {model.itm.negatives}"] if matches and model.itm.negatives != "random" else []
    chosen += ["run.grit.enabled: true"] if run.grit.enabled else []
    if not model.itc.weight and chosen:
        yield (
            f"model.itc.weight is 0, so nothing trains the similarities that {' and '.join(chosen)} go by, and that retrieval picks "
            "its candidates by. GRIT-VLP Table 1 takes those of an ITC model: model.pretrained; model.itm.negatives: random needs none."
        )
    ranks = run.task == "mafa_pretrain" and run.rank_by != "itc" and run.k_test
    if not matches and (run.valid_splits or run.test_splits) and ranks:
        off = "model.itm.negatives is none" if model.itm.weight else "model.itm.weight is 0"
        yield f"{off}, so nothing trains the matching head that ranks in retrieval; run.k_test: 0 ranks by the cosine alone."


# --- splits, image sizes, and runs of LAVIS's --------------------------------------------------------------------------


def check_splits(settings: Mapping[str, Any], splits: Mapping[str, Sequence[str]] | None = None) -> None:
    """Splits that the job uses and none of its data sets has, or that are for training; raises UserError.

    Args:
        splits: data set -> its splits, of all; default: of ours, and nothing is said where LAVIS's are among them.
    """
    run, datasets, found = settings["run"], settings["datasets"], Mistakes()
    used: dict[str, Any] = {key: run.get(key) or [] for key in ("train_splits", "valid_splits", "test_splits")}
    for key in ("valid_splits", "test_splits"):
        if "train" in used[key] and run.get("runner", "runner_mafa") == "runner_mafa":
            found.add(evaluates_training(f"run.{key}"))
    if splits is None:
        splits = {name: own_splits(name, block) for name, block in datasets.items() if name in SPLITS}
    if len(splits) < len(datasets):
        found.end()
        return
    known = list(dict.fromkeys(split for of_one in splits.values() for split in of_one))
    if run.get("evaluate") is True:
        used["train_splits"] = []
    elif run.get("train_splits") is None:
        used["train_splits"] = ["train"] if run["task"] in RUN_BLOCKS else []
    elif not used["train_splits"]:
        found.add("run.train_splits is [], but training needs a split; allowed: [train].")
    for key, wanted in used.items():
        for split in wanted:
            if split not in known and not (split == "train" and key != "train_splits"):
                has = f"{', '.join(splits)} has: {', '.join(known)}."
                found.add(f"run.{key} is {split!r}, but {has}{_how_to_set(split, splits)}")
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


def _image_sizes(model: Any, data: Mapping[str, Any], run: Mapping[str, Any]) -> Iterator[str]:
    """The processors that the job uses make images of the model's size; of our data sets alone."""
    size, evaluates = model.image_encoder.image_size, run.get("evaluate") is True
    modes = [] if evaluates else ["train"]
    if run.get("test_splits") or (run.get("valid_splits") and not evaluates):
        modes.append("eval")
    for key in [f"{name}.vis_processor.{mode}.image_size" for name in data for mode in modes if name in SPLITS]:
        given = at(data, key)
        if given is not None and given != size:
            yield f"datasets.{key} is {given}, but must be model.image_encoder.image_size ({size})."


def _lavis_run(run: Mapping[str, Any]) -> Iterator[str]:
    """What LAVIS's own runners and tasks answer with a traceback."""
    runner = run.get("runner", "runner_mafa")
    if TRUE_OR_FALSE.get(str(run.get("compile")).lower()):
        yield f"run.compile is true, but {run['task']} is a task of LAVIS's, which runs as it is; allowed: false."
    if runner in LAVIS_RUNNERS and run.get("lr_sched") == OURS:
        yield f"run.lr_sched is {OURS}, but {runner} does not tell it the steps of an epoch; use run.runner: runner_mafa."
    if run.get("lr_sched") == STEPWISE and run.get("lr_decay_rate") is None:
        yield NO_DECAY
    for key in ("max_iters", "iters_per_inner_epoch") if runner == "runner_iter" else ():
        if not isinstance(run.get(key), int) or run[key] < 1:
            yield f"run.{key} is {run.get(key)}, but runner_iter needs a whole number from 1."


def check_evaluates(run: Mapping[str, Any]) -> None:
    """An evaluation has something to evaluate on; raises UserError."""
    if run.get("evaluate") is True and not run.get("valid_splits") and not run.get("test_splits"):
        raise UserError(
            "run.valid_splits and run.test_splits are empty, so there is nothing to evaluate on; "
            "name a split of the data (--options run.test_splits=[test])."
        )
