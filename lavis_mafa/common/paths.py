"""``~`` and environment variables in paths, wherever a user may write one: in settings and on the command line."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from lavis_mafa.common.errors import Mistakes, UserError
from lavis_mafa.common.yaml_text import at

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
