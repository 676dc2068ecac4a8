"""Where our YAMLs are: ``projects/`` of a checkout, or the copy inside the installed package.

``~`` and environment variables in paths, wherever a user may write one: in settings and on the command line.

A YAML with its overrides and its model type's defaults, checked as far as that needs neither LAVIS, data nor weights.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lavis_mafa.config.check import (
    MODEL_DEFAULTS,
    check_checkpoints,
    check_combinations,
    check_device,
    check_image_sizes,
    check_lavis_run,
    check_splits,
    check_words,
    is_path,
)
from lavis_mafa.config.data_settings import SPLITS, check_block, check_info, missing_files, own_files
from lavis_mafa.config.processor_settings import SETTINGS, check_settings
from lavis_mafa.config.schema import MODEL_BLOCKS, RUN_BLOCKS, RunBlock, in_file, typed_block, without_wrong_keys
from lavis_mafa.config.yaml_text import at, read_yaml
from lavis_mafa.errors import Mistakes, UserError, did_you_mean


def projects_root() -> Path:
    package = Path(__file__).resolve().parents[1]
    inside = package / "projects"
    return inside if inside.is_dir() else package.parent / "projects"


def project_files() -> dict[str, Path]:
    """Every shipped YAML by its name below ``projects/``, sorted."""
    root = projects_root()
    return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find_yaml(name: str) -> Path:
    """A file of the user's, or one of ours by name.

    Raises:
        UserError: neither; the message names the nearest of ours.
    """
    path = Path(expanded(name, "the YAML"))
    if path.is_file():
        return path
    files = project_files()
    if name in files:
        return files[name]
    raise UserError(f"{name!r} is no file and none of the shipped YAMLs.{did_you_mean(name, files)} See `lavis-mafa ls`.")


# settings that are a path, or may be one; every path below a data set's build_info comes in addition
PATHS = (
    "model.pretrained",
    "model.finetuned",  # of LAVIS's models
    "model.stage_1",
    "model.tokenizer",
    "model.image_encoder.init",
    "model.text_encoder.init",
    "model.qformer.init",
    "model.language_model.init",
    "model.discriminator.checkpoint",
    "model.discriminator.image_encoder.init",
    "model.discriminator.text_encoder.init",
    "model.discriminator.qformer.init",
    "run.output_dir",
    "run.resume_ckpt_path",
    "run.coco_captions",
    "run.caption_references",
)
VARIABLE = re.compile(r"\$(\w+|\{\w+\})")


def expanded(text: str, key: str) -> str:
    """A path with its ``~`` and ``$NAME`` replaced, unless a file has that very name.

    Args:
        key: the setting or flag, for the message.

    Raises:
        UserError: there is no such variable, no such user, or a NUL, which no path can hold.

    Example:
        >>> expanded("~/runs", "run.output_dir"), expanded("$HOME/runs", "run.output_dir")
        ('/home/me/runs', '/home/me/runs')
    """
    if "\0" in text:
        raise UserError(f"{key} is {text!r}; allowed: a path, which holds no NUL.")
    if not ("$" in text or text.startswith("~")) or "://" in text or os.path.lexists(text):
        return text
    path = os.path.expanduser(os.path.expandvars(text))
    if unset := VARIABLE.search(path):
        raise UserError(f"{key} is {text!r}, but the environment has no {unset[1].strip('{}')}.")
    if path.startswith("~"):
        raise UserError(f"{key} is {text!r}, but there is no user {path.split('/')[0][1:]}.")
    return path


def expand_settings(config: DictConfig) -> None:
    """Replace ``~`` and environment variables in all paths of a configuration.

    Raises:
        UserError: as :func:`expanded`, of all of them.
    """
    found = Mistakes()
    for key in PATHS:
        parent, _, last = key.rpartition(".")
        block = at(config, parent)
        if isinstance(block, DictConfig) and isinstance(block.get(last), str):
            block[last] = found(expanded, block[last], key) or block[last]
    datasets = config.get("datasets")
    for name in map(str, datasets if isinstance(datasets, DictConfig) else ()):
        _expand_all(at(datasets, f"{name}.build_info"), f"datasets.{name}.build_info", found)
    found.end()


def _expand_all(node: Any, key: str, found: Mistakes) -> None:
    items = range(len(node)) if isinstance(node, ListConfig) else list(node) if isinstance(node, DictConfig) else ()
    for item in items:
        if isinstance(node[item], str):
            node[item] = found(expanded, node[item], f"{key}.{item}") or node[item]
        else:
            _expand_all(node[item], f"{key}.{item}", found)


def expand_arguments(arguments: Any, names: tuple[str, ...]) -> None:
    """The same in the flags of a command: those of type Path, and texts that are named.

    Raises:
        UserError: as :func:`expanded`.
    """
    for name, value in vars(arguments).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, Path) or (name in names and isinstance(value, str)):
            setattr(arguments, name, type(value)(expanded(str(value), flag)))
        elif isinstance(value, list) and (name in names or any(isinstance(one, Path) for one in value)):
            setattr(arguments, name, [type(one)(expanded(str(one), flag)) for one in value])


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
        UserError: a mistake; its ``messages`` are all of them.
    """
    config, _, found = examine(name, options, files)
    found.end()
    return config


def examine(name: str, options: list[str], files: bool = True) -> tuple[DictConfig, bool, Mistakes]:
    """The same, with all mistakes: the configuration, whether its data sets have the right form, and what is wrong.

    Where the model's block has mistakes, its right settings are in the configuration.

    Raises:
        UserError: there is no such file, or it has not the form of a configuration.
    """
    _check_environment()
    path = find_yaml(name)
    where, found = str(path), Mistakes()
    config = _read(path, options)
    _check_form(config, where)
    found(expand_settings, config)
    data = found(_data, config, where)
    for key in map(str, config):
        if key not in ("model", "datasets", "run", "preprocess"):
            hint = did_you_mean(key, ("model", "datasets", "run"))
            found.add(f"{key} is not a block.{hint} Allowed: model, datasets, run. ({path})")
    if not isinstance(config.get("preprocess", {}), DictConfig | dict):
        found(_must_be_block, config, "preprocess", where)
        del config["preprocess"]
    config, model = _model(config, where, found)
    run, before = None, len(found.messages)
    if config.run.get("task") in RUN_BLOCKS:
        run = found(typed_block, "run", config.run, where)
    else:  # of LAVIS's tasks the keys that we know; YAMLs of theirs say `amp` and more beside them
        known_keys = {f.name for f in dataclasses.fields(RunBlock)} - {"grit", "task"}
        found(typed_block, "run", {str(k): v for k, v in config.run.items() if k in known_keys}, where)
        found(check_lavis_run, config.run, where)
    sound = len(found.messages) == before  # what was refused, or stands for it, is no setting to combine
    if sound:
        found(check_combinations, model, run, where, files)
        if data is not None:
            found(check_splits, config, where)
    if model is not None and run is None and sound:  # one of LAVIS's tasks, whose other keys are LAVIS's
        found(check_device, model, str(config.run.get("device", "cuda")), where=where)
        if files:
            found(check_checkpoints, model, bool(config.run.get("evaluate", False)), where)
    if model is not None and data is not None:
        found(check_image_sizes, model, data if files else config.datasets, config.run, where)
    if files:
        found(_check_folder, config, where)
        absent = _check_files(config, where, found)
        if model is not None:
            found(check_words, model)
        if model is not None and any(at(config, key) for key in CHECKPOINTS if key not in absent):
            from lavis_mafa.config.check import check_kinds  # imports torch, which costs seconds

            silent = config.run.get("evaluate") is True and config.run.task != "mafa_captioning"  # asks no language head
            found(check_kinds, model, absent, silent)
        found(_check_loadable, config, where, absent)
        _check_data_files(config, found)
    return config, data is not None, found


def _check_form(config: DictConfig, where: str) -> None:
    """The three blocks, and the two names on which all else depends; raises UserError."""
    found = Mistakes()
    for key in sorted(OmegaConf.missing_keys(config)):
        found.add(f"{key} is ???, which stands for a value that is still to be given. ({where})")
    found.end()
    for block in ("model", "datasets", "run"):
        if config.get(block) is None:
            found.add(f"{block} is missing; a YAML has the blocks model, datasets and run. ({where})")
        else:
            found(_must_be_block, config, block, where)
    found.end()
    if not config.datasets:
        found.add(f"datasets is empty; name at least one, such as grit_pairs or grit_emoji. ({where})")
    for block, key, example in (("model", "arch", "albef_mafa"), ("run", "task", "mafa_pretrain")):
        if not isinstance(config[block].get(key), str):
            found.add(f"{block}.{key} is {config[block].get(key)}; allowed: a registered name, such as {example}. ({where})")
    found.end()


def _model(config: DictConfig, where: str, found: Mistakes) -> tuple[DictConfig, Any]:
    """The configuration with the model type's defaults, and the typed block; None for LAVIS's models, and where there are mistakes."""
    arch = config.model.arch
    if arch not in MODEL_BLOCKS:
        return config, None
    kind, known = config.model.get("model_type"), _model_types(arch)
    if kind not in known:
        found.add(f"model.model_type is {kind!r}, but {arch} has: {', '.join(known)}. ({where})")
        return config, None
    before = len(found.messages)
    # before the defaults are merged, which fails at a list for a block
    config.model = without_wrong_keys("model", config.model, found, where)
    config = _merged(OmegaConf.load(MODEL_DEFAULTS / f"{arch}_{kind}.yaml"), config)
    if config.run.get("evaluate") is True and "ecm" in config.model:
        config.model.ecm = {**config.model.ecm, "enabled": False}  # evaluating needs no Con-D
    model = found(typed_block, "model", config.model, where)
    return config, model if len(found.messages) == before else None


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
        if option.endswith("="):  # of a shell's variable that is not set, most likely: training would start without a checkpoint
            raise UserError(f"--options {option}: there is no value; write {option}null for none.")
        try:
            config = _merged(config, OmegaConf.from_dotlist([option]))
        except (YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
            raise UserError(f"--options {option}: cannot be set ({' '.join(str(error).split())}).") from error
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        hint = (
            " A variable of the environment is $NAME in a path, and ${oc.env:NAME} everywhere."
            if "Interpolation key" in str(error)
            else ""
        )
        raise UserError(f"{error.full_key or 'a reference (${...})'}: {str(error).splitlines()[0]}.{hint} ({path})") from error
    except RecursionError as error:
        raise UserError(f"{path}: its references (${{...}}) lead to each other without an end.") from error
    _no_references(config, "", path)
    return config


def _no_references(node: Any, key: str, path: Path) -> None:
    """What still looks like a reference was escaped (``\\${x}``), and would be followed wherever the configuration is copied."""
    if isinstance(node, DictConfig | ListConfig):
        items = enumerate(node._iter_ex(resolve=False)) if isinstance(node, ListConfig) else node.items_ex(resolve=False)
        for name, child in items:
            _no_references(child, f"{key}.{name!s}".lstrip("."), path)
    elif isinstance(node, str) and "${" in node:
        raise UserError(f"{key} is {node!r}, but a setting cannot hold ${{...}} as text. ({path})")


def _must_be_block(config: DictConfig, key: str, where: str, parent: str = "") -> None:
    value = at(config, key)
    if not isinstance(value, DictConfig):
        shown = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        raise UserError(f"{parent}{key} is {shown!r}, but must be a block of settings. ({where})")


def _data(config: DictConfig, where: str) -> DictConfig:
    """The checked blocks below ``datasets``, ours with their defaults; of LAVIS's the form alone, whose defaults are not read yet."""
    data, found = OmegaConf.create({}), Mistakes()
    for dataset in config.datasets:
        if not isinstance(dataset, str) or not dataset.isidentifier():
            found.add(f"datasets.{dataset} is no name of a data set; it is a word, such as grit_pairs or grit_emoji. ({where})")
        else:
            data[dataset] = found(_data_set, config, dataset, where)
    found.end()
    return data


def _data_set(config: DictConfig, dataset: str, where: str) -> DictConfig:
    _must_be_block(config, f"datasets.{dataset}", where)
    block, found = config.datasets[dataset], Mistakes()
    for part in ("build_info", "vis_processor", "text_processor"):
        if part in block:
            found(_must_be_block, config, f"datasets.{dataset}.{part}", where)
    found.end()
    found(check_block, dataset, block)
    for part in ("vis_processor", "text_processor"):
        for split in block.get(part, {}):
            _must_be_block(config, f"datasets.{dataset}.{part}.{split}", where)
            key, processor = f"datasets.{dataset}.{part}.{split}", block[part][split]
            if "name" in processor:
                found(check_processor_name, key, processor, where)
                if dataset not in SPLITS and processor.name in SETTINGS:
                    found(check_settings, processor.name, processor, key)
    if dataset in SPLITS:
        if "build_info" in block:
            found(check_info, dataset, block.build_info)
        found.end()
        block = _merged(OmegaConf.load(DATA_DEFAULTS / dataset / "defaults.yaml").datasets[dataset], block)
        _check_processors(f"datasets.{dataset}", block, where)
    else:
        _check_lavis_info(f"datasets.{dataset}", block, where)
    found.end()
    return block


def _check_lavis_info(name: str, block: DictConfig, where: str) -> None:
    """The form of what LAVIS's builders read; raises UserError."""
    found = Mistakes()
    if not isinstance(block.get("type", "default"), str):
        found.add(f"{name}.type is {block.type!r}, but must be a text: which of its default configurations.{in_file(where)}")
    info = block.get("build_info", {})
    for part in info:
        key = f"build_info.{part}"
        if part in ("annotations", "images"):
            found(_must_be_block, block, key, where, f"{name}.")
        annotations = at(block, key) if part == "annotations" else None
        splits = [f"{key}.{split}" for split in map(str, annotations)] if isinstance(annotations, DictConfig) else []
        for split in [key] if part == "images" else splits:
            found(_must_be_block, block, split, where, f"{name}.")
            for kind in ("url", "storage"):
                value = at(block, f"{split}.{kind}")
                texts = list(value) if isinstance(value, ListConfig) else [value]
                if value is not None and not all(isinstance(text, str) for text in texts):
                    found.add(f"{name}.{split}.{kind} is {value!r}, but must be a path or a list of paths.{in_file(where)}")
    found.end()


def _check_processors(dataset: str, block: DictConfig, where: str) -> None:
    """Of a data set with its defaults: every processor has a name, and ours settings that they know."""
    found = Mistakes()
    for part in ("vis_processor", "text_processor"):
        for split, processor in block.get(part, {}).items():
            found(check_processor_name, f"{dataset}.{part}.{split}", processor, where)
            if processor.get("name") in SETTINGS:
                found(check_settings, processor.name, processor, f"{dataset}.{part}.{split}")
    found.end()


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


def _check_loadable(config: DictConfig, where: str, absent: set[str]) -> None:
    """Files that are otherwise read after the data, or by LAVIS, which answers one that it cannot load with a traceback."""
    wanted, found = ["run.resume_ckpt_path"], Mistakes()
    if config.model.arch not in MODEL_BLOCKS:
        wanted.append("model.finetuned" if config.model.get("load_finetuned", True) else "model.pretrained")
    for key in wanted:
        value = at(config, key)
        if not isinstance(value, str) or "://" in value or (key, value) == ("run.resume_ckpt_path", "auto") or key in absent:
            continue
        if value.endswith(".safetensors"):
            found.add(f"{key} is {value!r}, but must be a .pth file: safetensors hold weights alone. ({where})")
            continue
        from lavis_mafa.weights import read_checkpoint  # imports torch, which costs seconds

        found(read_checkpoint, value, key, names_only=True)
    found.end()


def _check_folder(config: DictConfig, where: str) -> None:
    """The folder of the runs can be made and written; raises UserError."""
    folder = Path(str(config.run.get("output_dir") or RunBlock().output_dir)).absolute()
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        reason = "that is not a folder" if not nearest.is_dir() else "the right to write there is missing"
        raise UserError(f"run.output_dir: cannot write in {folder}: {nearest}: {reason}. ({where})")


def _check_files(config: DictConfig, where: str, found: Mistakes) -> set[str]:
    """Checkpoints, tokenizers and the like that are named and not there: the keys of those."""
    downloads = config.model.get("arch") not in MODEL_BLOCKS  # LAVIS's own models take URLs, ours local files alone
    absent = set()
    for key in FILES:
        value = at(config, key)
        if value is not None and not isinstance(value, str):
            found.add(f"{key} is {value}, but must be the path of a file. ({where})")
            absent.add(key)
        if (key, value) == ("run.resume_ckpt_path", "auto"):
            continue  # the newest checkpoint of the same run, if there is one
        # weights may lie in a folder, as Hugging Face's do
        there = Path.exists if key in CHECKPOINTS and not downloads else Path.is_file
        if isinstance(value, str) and not (downloads and "://" in value) and not there(Path(value)):
            hint = " Download it first." if "://" in value else ""
            found.add(f"{key} is {value!r}, but there is no such file.{hint} ({where})")
            absent.add(key)
    for key in FOLDERS:
        value = at(config, key)
        if isinstance(value, str) and is_path(value) and not Path(value).exists():
            found.add(f"{key} is {value!r}, but there is no such file or folder. ({where})")
    return absent


def _check_data_files(config: DictConfig, found: Mistakes) -> None:
    """Annotation files and image folders of our data sets; of LAVIS's, whose defaults name theirs, see ``job``."""
    for name in map(str, config.datasets):
        info, wrong = at(config, f"datasets.{name}.build_info") or OmegaConf.create({}), Mistakes()
        if name in SPLITS and isinstance(info, DictConfig):
            wrong(check_info, name, info)  # which was told before
            default = OmegaConf.load(DATA_DEFAULTS / name / "defaults.yaml").datasets[name]
            block = _merged({"build_info": default.build_info}, {"build_info": info}) if not wrong.messages else None
            for message in [] if block is None else found(data_files_missing, name, block) or ():
                found.add(message)


def data_files_missing(name: str, block: DictConfig) -> list[str]:
    """A message for each file of a data set of ours that is not there.

    Raises:
        UserError: no file is named.
    """
    where, info = f"datasets.{name}.build_info", block.build_info
    if name == "grit_emoji":
        built = (Path(info.root) / "truth.parquet").is_file()
        return [] if built else [f"{info.root} holds no emoji data; build them once with: lavis-mafa build-emoji {info.root}"]
    files, root, _ = own_files(where, info, SPLITS[name])
    return missing_files(where, files, root)
