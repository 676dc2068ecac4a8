"""A YAML with its overrides and its model type's defaults, checked as far as that needs neither LAVIS, data nor weights."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lavis_mafa.common.check import (
    MODEL_DEFAULTS,
    check_checkpoints,
    check_combinations,
    check_device,
    check_image_sizes,
    check_splits,
)
from lavis_mafa.common.errors import UserError, did_you_mean
from lavis_mafa.common.hub import is_path
from lavis_mafa.common.projects import find_yaml
from lavis_mafa.common.settings import RunBlock
from lavis_mafa.common.typed import MODEL_BLOCKS, RUN_BLOCKS, check_keys, in_file, typed_block
from lavis_mafa.common.words import check_words
from lavis_mafa.common.yaml_text import read_yaml
from lavis_mafa.datasets.build_info import SPLITS, check_info
from lavis_mafa.processors.settings import SETTINGS, check_settings

DATA_DEFAULTS = MODEL_DEFAULTS.parent / "datasets"
CHECKPOINTS = ("model.pretrained", "model.stage_1", "model.discriminator.checkpoint")
FILES = (
    *CHECKPOINTS,
    "run.resume_ckpt_path",
    "run.coco_captions",
    "run.caption_references",
)

FOLDERS = (  # hub names or local paths
    "model.tokenizer",
    "model.image_encoder.init",
    "model.text_encoder.init",
    "model.qformer.init",
    "model.language_model.init",
)


def check_yaml(name: str, options: list[str], files: bool = True) -> DictConfig:
    """Read a YAML with overrides and check all that can be checked without LAVIS, data or weights.

    Args:
        name: a file, or the name of a shipped YAML.
        options: KEY=VALUE overrides.
        files: False leaves out what this machine must have: checkpoints that are not named yet, or not there.

    Returns:
        the merged configuration (model type's defaults, then the file, then the overrides).

    Raises:
        UserError: the first mistake found.
    """
    _check_environment()
    path = find_yaml(name)
    config = _read(path, options)
    for key in sorted(OmegaConf.missing_keys(config)):
        raise UserError(f"{key} is ???, which stands for a value that is still to be given. ({path})")
    for block in ("model", "datasets", "run"):
        if config.get(block) is None:
            raise UserError(f"{block} is missing; a YAML has the blocks model, datasets and run. ({path})")
        _must_be_block(config, block, str(path))
    data = _data(config, str(path))
    for key in map(str, config):
        if key not in ("model", "datasets", "run", "preprocess"):
            hint = did_you_mean(key, ("model", "datasets", "run"))
            raise UserError(f"{key} is not a block.{hint} Allowed: model, datasets, run. ({path})")
    for block, key, example in (("model", "arch", "albef_mafa"), ("run", "task", "mafa_pretrain")):
        if not isinstance(config[block].get(key), str):
            raise UserError(f"{block}.{key} is {config[block].get(key)}; allowed: a registered name, such as {example}. ({path})")
    arch = config.model.arch
    model = None
    if arch in MODEL_BLOCKS:
        kind, known = config.model.get("model_type"), _model_types(arch)
        if kind not in known:
            raise UserError(f"model.model_type is {kind!r}, but {arch} has: {', '.join(known)}. ({path})")
        check_keys("model", config.model, str(path))  # before the defaults are merged, which fails at a list for a block
        config = _merged(OmegaConf.load(MODEL_DEFAULTS / f"{arch}_{kind}.yaml"), config)
        if config.run.get("evaluate") is True and "ecm" in config.model:
            config.model.ecm = {**config.model.ecm, "enabled": False}  # evaluating needs no Con-D
        model = typed_block("model", config.model, str(path))
    run = typed_block("run", config.run, str(path)) if config.run.get("task") in RUN_BLOCKS else None
    if run is None:  # of LAVIS's tasks the keys that we know; YAMLs of theirs say `amp` and more beside them
        known_keys = {f.name for f in dataclasses.fields(RunBlock)} - {"grit", "task"}
        typed_block("run", {str(k): v for k, v in config.run.items() if k in known_keys}, str(path))
    check_combinations(model, run, str(path), files)
    if model is not None and run is None:  # one of LAVIS's tasks, whose other keys are LAVIS's
        check_device(model, str(config.run.get("device", "cuda")), where=str(path))
        if files:
            check_checkpoints(model, bool(config.run.get("evaluate", False)), str(path))
    check_splits(config, str(path))
    if model is not None:
        check_image_sizes(model, data if files else config.datasets, config.run, str(path))
    if files:
        _check_files(config, str(path))
        if model is not None:
            check_words(model)
        if model is not None and any(OmegaConf.select(config, key) for key in CHECKPOINTS):
            from lavis_mafa.common.checkpoint_kinds import check_kinds  # imports torch, which costs seconds

            check_kinds(model, evaluate=config.run.get("evaluate") is True and config.run.task != "mafa_captioning")
        _check_loadable(config, str(path))
    return config


def _check_environment() -> None:
    """LAVIS and transformers leave it to torch whether a checkpoint may run code; ours never may."""
    name = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    if os.environ.get(name, "0").lower() in ("1", "y", "yes", "true"):
        raise UserError(
            f"{name} is {os.environ[name]} in the environment, which lets checkpoints run code as they are loaded; unset it."
        )


def _model_types(arch: str) -> list[str]:
    return sorted(file.stem.removeprefix(f"{arch}_") for file in MODEL_DEFAULTS.glob(f"{arch}_*.yaml"))


def _read(path: Path, options: list[str]) -> DictConfig:
    """The file with its overrides, references resolved."""
    config = read_yaml(path)
    if not isinstance(config, DictConfig):
        raise UserError(f"{path} must have the blocks model, datasets and run at its top level.")
    for option in options:
        if "=" not in option:
            raise UserError(f"--options takes KEY=VALUE, not {option!r}.")
        try:
            config = _merged(config, OmegaConf.from_dotlist([option]))
        except (YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
            raise UserError(f"--options {option}: cannot be set ({' '.join(str(error).split())}).") from error
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'a reference (${...})'}: {str(error).splitlines()[0]}. ({path})") from error
    except RecursionError as error:
        raise UserError(f"{path}: its references (${{...}}) lead to each other without an end.") from error
    return config


def _must_be_block(config: DictConfig, key: str, where: str) -> None:
    value = OmegaConf.select(config, key)
    if not isinstance(value, DictConfig):
        shown = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        raise UserError(f"{key} is {shown!r}, but must be a block of settings. ({where})")


def _data(config: DictConfig, where: str) -> DictConfig:
    """The checked blocks below ``datasets``, ours with their defaults; of LAVIS's the form alone, whose defaults are not read yet."""
    if not config.datasets:
        raise UserError(f"datasets is empty; name at least one, such as grit_pairs or grit_emoji. ({where})")
    data = OmegaConf.create({})
    for dataset in config.datasets:
        if not isinstance(dataset, str) or not dataset.isidentifier():
            raise UserError(f"datasets.{dataset} is no name of a data set; it is a word, such as grit_pairs or grit_emoji. ({where})")
        _must_be_block(config, f"datasets.{dataset}", where)
        block = config.datasets[dataset]
        for part in ("build_info", "vis_processor", "text_processor"):
            if part in block:
                _must_be_block(config, f"datasets.{dataset}.{part}", where)
        for part in ("vis_processor", "text_processor"):
            for split in block.get(part, {}):
                _must_be_block(config, f"datasets.{dataset}.{part}.{split}", where)
                if "name" in block[part][split]:
                    check_processor_name(f"datasets.{dataset}.{part}.{split}", block[part][split], where)
        if dataset in SPLITS:
            if "build_info" in block:
                check_info(dataset, block.build_info)
            block = _merged(OmegaConf.load(DATA_DEFAULTS / dataset / "defaults.yaml").datasets[dataset], block)
            _check_processors(f"datasets.{dataset}", block, where)
        data[dataset] = block
    return data


def _check_processors(dataset: str, block: DictConfig, where: str) -> None:
    """Of a data set with its defaults: every processor has a name, and ours settings that they know."""
    for part in ("vis_processor", "text_processor"):
        for split, processor in block.get(part, {}).items():
            check_processor_name(f"{dataset}.{part}.{split}", processor, where)
            if processor.name in SETTINGS:
                check_settings(processor.name, processor, f"{dataset}.{part}.{split}")


def check_processor_name(key: str, processor: DictConfig, where: str = "") -> None:
    """The ``name`` of a processor's block is a text; raises UserError."""
    name = processor.get("name")
    if not isinstance(name, str):
        example = "albef_caption" if ".text_processor." in key else f"albef_image_{'train' if key.endswith('.train') else 'eval'}"
        raise UserError(f"{key}.name is {name!r}, but must be a registered processor, such as {example}.{in_file(where)}")


def _merged(below: Any, above: Any) -> DictConfig:
    merged = OmegaConf.merge(below, above)
    assert isinstance(merged, DictConfig)
    return merged


def _check_loadable(config: DictConfig, where: str) -> None:
    """Files that are otherwise read after the data, or by LAVIS, which answers one that it cannot load with a traceback."""
    wanted = ["run.resume_ckpt_path"]
    if config.model.arch not in MODEL_BLOCKS:
        wanted.append("model.finetuned" if config.model.get("load_finetuned", True) else "model.pretrained")
    for key in wanted:
        value = OmegaConf.select(config, key)
        if not isinstance(value, str) or "://" in value or (key, value) == ("run.resume_ckpt_path", "auto"):
            continue
        if value.endswith(".safetensors"):
            raise UserError(f"{key} is {value!r}, but must be a .pth file: safetensors hold weights alone. ({where})")
        from lavis_mafa.common.weights import read_checkpoint  # imports torch, which costs seconds

        read_checkpoint(value, key, names_only=True)


def _check_files(config: DictConfig, where: str) -> None:
    downloads = config.model.get("arch") not in MODEL_BLOCKS  # LAVIS's own models take URLs, ours local files alone
    for key in FILES:
        value = OmegaConf.select(config, key)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{key} is {value}, but must be the path of a file. ({where})")
        if (key, value) == ("run.resume_ckpt_path", "auto"):
            continue  # the newest checkpoint of the same run, if there is one
        # weights may lie in a folder, as Hugging Face's do
        there = Path.exists if key in CHECKPOINTS and not downloads else Path.is_file
        if isinstance(value, str) and not (downloads and "://" in value) and not there(Path(value)):
            hint = " Download it first." if "://" in value else ""
            raise UserError(f"{key} is {value!r}, but there is no such file.{hint} ({where})")
    for key in FOLDERS:
        value = OmegaConf.select(config, key)
        if isinstance(value, str) and is_path(value) and not Path(value).expanduser().exists():
            raise UserError(f"{key} is {value!r}, but there is no such file or folder. ({where})")
