"""From a name, a file or a flag to a tree of settings; nothing here knows what a setting means, and nothing slow is imported."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_mafa.errors import UserError, did_you_mean

BYTES = 2**20
DEPTH = 50
NODES = 100_000  # keys and values, after every alias is followed: nine lines of aliases can stand for a billion
VARIABLE = re.compile(r"\$(\w+|\{\w+\})")

# --- which file --------------------------------------------------------------------------------------------------------


def projects_root() -> Path:
    """``projects/`` of a checkout, or the copy inside the installed package."""
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


def expand_arguments(arguments: Any, names: tuple[str, ...]) -> None:
    """The same in the flags of a command: those of type Path, and texts that are named; raises UserError."""
    for name, value in vars(arguments).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, Path) or (name in names and isinstance(value, str)):
            setattr(arguments, name, type(value)(expanded(str(value), flag)))
        elif isinstance(value, list) and (name in names or any(isinstance(one, Path) for one in value)):
            setattr(arguments, name, [type(one)(expanded(str(one), flag)) for one in value])


# --- its text ----------------------------------------------------------------------------------------------------------


class _SettingsAlone(yaml.SafeLoader):
    """Composes a document without tags, which name classes, and without a depth that a recursive reader fails at."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        place = f"line {event.start_mark.line + 1}"
        if getattr(event, "tag", None) is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise UserError(f"{place}: the tag {tag} is not allowed; a setting is a text, a number, true, false or null.")
        self.depth += 1
        if self.depth > DEPTH:
            raise UserError(f"{place}: blocks and lists are nested more than {DEPTH} deep.")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_yaml(path: Path) -> DictConfig:
    """The tree of a file; references (``${run.seed}``) are not resolved yet.

    Raises:
        UserError: it is no YAML, or not of settings alone: it holds code, itself, or what would fill the memory.
    """
    try:
        if path.stat().st_size > BYTES:
            raise UserError(f"{path} is larger than {BYTES:,} bytes, which no configuration is.")
        text = path.read_text(encoding="utf-8")
        try:
            root = yaml.compose(text, _SettingsAlone)
            nodes = _count(root, {})
        except UserError as error:
            raise UserError(f"{path}, {error}") from None
        if nodes > NODES:
            raise UserError(f"{path} has {nodes:,} values once its aliases (*name) are followed; allowed: {NODES:,}.")
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path} must have the blocks model, datasets and run at its top level.")
        config: Any = OmegaConf.load(io.StringIO(text))  # by its own rules: no duplicate keys, no dates, 1e-4 is a number
        return config
    except UserError:
        raise
    # ValueError: wrong bytes, and what looks like a number but is none, such as `._`
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        reason = " ".join(str(error).replace('"<file>", ', "").replace('"<unicode string>", ', "").split())
        raise UserError(f"{path} is not readable as YAML: {reason}.") from error


def _count(node: Any, known: dict[int, int]) -> int:
    """Nodes of a tree whose branches may be shared; each is counted as often as it is referred to, but visited once."""
    if node is None:
        return 0
    if id(node) not in known:
        known[id(node)] = -1  # under way
        children = node.value if isinstance(node.value, list) else []
        flat = [child for entry in children for child in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_count(child, known) for child in flat)
    if known[id(node)] < 0:
        raise UserError(f"line {node.start_mark.line + 1}: a block contains itself by an alias (*name).")
    return known[id(node)]


def read_settings(path: Path, options: list[str]) -> dict[str, Any]:
    """A file with its overrides (``KEY=VALUE``), references resolved; raises UserError."""
    config = read_yaml(path)
    for option in options:
        if "=" not in option:
            raise UserError(f"--options takes KEY=VALUE, not {option!r}.")
        if option.endswith("="):  # of a shell's variable that is not set, most likely: training would start without a checkpoint
            raise UserError(f"--options {option}: there is no value; write {option}null for none.")
        try:
            config.merge_with(OmegaConf.from_dotlist([option]))
        except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
            raise UserError(f"--options {option}: cannot be set ({' '.join(str(error).split())}).") from error
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        escaped = "Interpolation key" in str(error)
        hint = " A variable of the environment is $NAME in a path, and ${oc.env:NAME} everywhere." if escaped else ""
        raise UserError(f"{error.full_key or 'a reference (${...})'}: {str(error).splitlines()[0]}.{hint} ({path})") from error
    except RecursionError as error:
        raise UserError(f"{path}: its references (${{...}}) lead to each other without an end.") from error
    settings: dict[str, Any] = OmegaConf.to_container(config, resolve=False)  # type: ignore[assignment]
    missing = []
    for key, text in _texts(settings):
        # what still looks like a reference was escaped (\${x}), and would be followed wherever the configuration is copied
        if "${" in text:
            raise UserError(f"{key} is {text!r}, but a setting cannot hold ${{...}} as text. ({path})")
        if text == "???":
            missing.append(f"{key} is ???, which stands for a value that is still to be given. ({path})")
    if missing:
        raise UserError(*missing)
    return settings


def _texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a tree, by its dotted key."""
    if isinstance(node, str):
        yield key, node
    for name, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from _texts(child, f"{key}.{name}".lstrip("."))


# --- trees -------------------------------------------------------------------------------------------------------------


def plain(values: Any) -> Any:
    """Dictionaries and lists of Python's, references resolved."""
    return OmegaConf.to_container(values, resolve=True) if OmegaConf.is_config(values) else values


def flat(tree: Any, before: str = "") -> dict[str, Any]:
    """The leaves of nested blocks by their dotted keys; an empty block is one.

    Example:
        >>> flat({"run": {"grit": {"enabled": True}, "seed": 42}})
        {'run.grit.enabled': True, 'run.seed': 42}
    """
    if not isinstance(tree, Mapping) or not tree:
        return {before: tree}
    return {key: leaf for name, below in tree.items() for key, leaf in flat(below, f"{before}.{name}" if before else str(name)).items()}


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``: blocks are joined, anything else is replaced."""
    joined = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], Mapping) and isinstance(above[key], Mapping):
            joined[key] = merged(below[key], above[key])
    return joined


def at(tree: Any, key: str) -> Any:
    """The value at a dotted key; None where there is none, also where something on the way is no block."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping | DictConfig) else None
    return tree
