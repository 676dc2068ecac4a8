"""A YAML file as a tree of settings. One that asks for more than settings is refused: code, itself, or all of the memory."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_mafa.errors import UserError

BYTES = 2**20
DEPTH = 50
NODES = 100_000  # keys and values, after every alias is followed: nine lines of aliases can stand for a billion


def read_yaml(path: Path) -> Any:
    """Read a file; references (``${run.seed}``) are not resolved yet.

    Raises:
        UserError: it is no YAML, or not of settings alone; the message names the file and the place.
    """
    try:
        if path.stat().st_size > BYTES:
            raise UserError(f"{path} is larger than {BYTES:,} bytes, which no configuration is.")
        text = path.read_text(encoding="utf-8")
        _check_events(text, path)
        nodes = _count(yaml.compose(text, yaml.SafeLoader), {}, path)
        if nodes > NODES:
            raise UserError(f"{path} has {nodes:,} values once its aliases (*name) are followed; allowed: {NODES:,}.")
        return OmegaConf.load(io.StringIO(text))
    except UserError:
        raise
    # ValueError: wrong bytes, and what looks like a number but is none, such as `._`
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        reason = " ".join(str(error).replace('"<file>", ', "").replace('"<unicode string>", ', "").split())
        raise UserError(f"{path} is not readable as YAML: {reason}.") from error


def at(config: Any, key: str) -> Any:
    """The value at a dotted key; None where there is none, also where something on the way is no block."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, DictConfig) else None
    return config


def _check_events(text: str, path: Path) -> None:
    """No tags, which name classes, and no depth that a recursive reader fails at."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        place = f"{path}, line {event.start_mark.line + 1}"
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH:
            raise UserError(f"{place}: blocks and lists are nested more than {DEPTH} deep.")
        tag = getattr(event, "tag", None)
        if tag is not None:
            tag = tag.replace("tag:yaml.org,2002:", "!!")
            raise UserError(f"{place}: the tag {tag} is not allowed; a setting is a text, a number, true, false or null.")


def _count(node: Any, known: dict[int, int], path: Path) -> int:
    """Nodes of a tree whose branches may be shared; each is counted as often as it is referred to, but visited once."""
    if node is None:
        return 0
    if id(node) not in known:
        known[id(node)] = -1  # under way
        children = node.value if isinstance(node.value, list) else []
        flat = [child for entry in children for child in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_count(child, known, path) for child in flat)
    if known[id(node)] < 0:
        raise UserError(f"{path}, line {node.start_mark.line + 1}: a block contains itself by an alias (*name).")
    return known[id(node)]
