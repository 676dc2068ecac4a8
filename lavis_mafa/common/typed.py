"""From what a user wrote to a checked, typed block: unknown keys, wrong types, values out of their choices or range."""

from __future__ import annotations

import copy
import dataclasses
import typing
from typing import Any, get_args

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_mafa.common.errors import Mistakes, UserError, did_you_mean
from lavis_mafa.common.model_settings import AlbefBlock, Blip2Block, Blip2OptBlock, BlipBlock
from lavis_mafa.common.old_names import replaced_by
from lavis_mafa.common.settings import CHOICES, INFINITE, RANGES, CaptioningRun, RunBlock, VqaRun

MODEL_BLOCKS: dict[str, Any] = {
    "albef_mafa": AlbefBlock,
    "blip_mafa": BlipBlock,
    "blip2_mafa": Blip2Block,
    "blip2_opt_mafa": Blip2OptBlock,
}
RUN_BLOCKS: dict[str, Any] = {
    "mafa_pretrain": RunBlock,
    "mafa_captioning": CaptioningRun,
    "mafa_vqa": VqaRun,
    "mafa_gqa": VqaRun,
}

LARGEST = 2**31 - 1  # what a 32-bit integer takes
LARGEST_SEED = 2**32 - 1  # what numpy's takes
WORDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
LARGEST_FLOAT = 1e9  # of rates, weights and minutes: far from what a sum in fp32 overflows at


def typed_block(name: str, values: DictConfig | dict[str, Any], where: str = "", shown: str = "") -> Any:
    """A checked instance of the block ``name`` with defaults filled in.

    Args:
        name: ``model`` (which one says ``values.arch``) or ``run`` (which one says ``values.task``).
        values: what the user wrote, already merged with the model type's defaults.
        where: the file, for the message.
        shown: how the message calls the block, if not by its name.

    Raises:
        UserError: an unknown key, a wrong type, a value outside its choices or range.
    """
    values = values if isinstance(values, DictConfig) else OmegaConf.create(values)
    shown, found = shown or name, Mistakes()
    schema, values = schema_of(name, values), without_wrong_keys(name, values, found, where, shown)
    while True:
        try:
            block = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
            break
        except (OmegaConfBaseException, TypeError) as error:  # TypeError: a list and a block do not merge
            full_key = getattr(error, "full_key", None) or ""
            got = OmegaConf.select(values, full_key) if full_key else values
            key = f"{shown}.{full_key}" if full_key else shown
            found.add(f"{key} is {_plain(got)!r}, but must be {_wanted(schema, full_key)}.{in_file(where)}")
            if not _dropped(values, full_key):
                raise UserError(*found.messages) from error
    _check_values(block, name, shown, where, found)
    found.end()
    return block


def schema_of(name: str, values: DictConfig) -> Any:
    """The dataclass of a block."""
    return RUN_BLOCKS[values.get("task", "mafa_pretrain")] if name == "run" else MODEL_BLOCKS[values.get("arch", "albef_mafa")]


def without_wrong_keys(name: str, values: DictConfig, found: Mistakes, where: str = "", shown: str = "") -> DictConfig:
    """A copy of a block without the keys that it does not know, or that hold something else where a block or a list belongs.

    Args:
        found: is told of each.
        name, values, where, shown: as for :func:`typed_block`.
    """
    kept = copy.deepcopy(values)
    _drop_wrong_keys(schema_of(name, values), kept, shown or name, where, found)
    return kept


def _dropped(values: DictConfig, full_key: str) -> bool:
    """Take a key out of a block, so that what else is wrong can be found; False where there is none."""
    parent, _, last = full_key.split("[")[0].rpartition(".")
    block = OmegaConf.select(values, parent) if parent else values
    if not isinstance(block, DictConfig) or last not in block:
        return False
    del block[last]
    return True


def in_file(where: str) -> str:
    """`` (where)``, or nothing."""
    return f" ({where})" if where else ""


def _drop_wrong_keys(schema: type, values: DictConfig, path: str, where: str, found: Mistakes) -> None:
    fields = {f.name: f.type for f in dataclasses.fields(schema)}
    hints = _resolved(schema)
    for node in list(values):
        key = str(node)
        if key not in fields:
            hint = replaced_by(f"{path}.{key}") or f"{did_you_mean(key, fields)} Allowed: {', '.join(sorted(fields))}."
            found.add(f"{path}.{key} is not a setting.{hint}{in_file(where)}")
            del values[node]
            continue
        below = hints[key]
        child = values[node] if not OmegaConf.is_missing(values, node) else None
        may_be_null = "Optional" in str(fields[key])
        if dataclasses.is_dataclass(below) and isinstance(below, type) and isinstance(child, DictConfig):
            _drop_wrong_keys(below, child, f"{path}.{key}", where, found)
        elif (child is not None or not may_be_null) and (wanted := _misplaced(below, child, f"{path}.{key}")):
            found.add(f"{path}.{key} is {repr(_plain(child))[:200]}, but must be {wanted}.{in_file(where)}")
            del values[node]


def _misplaced(below: Any, child: Any, key: str) -> str | None:
    """What a field takes, where ``child`` has another form than that; OmegaConf would convert some of it, and fail at the rest."""
    if dataclasses.is_dataclass(below) or str(below).startswith("dict"):
        return None if isinstance(child, DictConfig) else "a block of settings"
    if str(below).startswith("list"):
        if isinstance(child, DictConfig) and child and all(value is None for value in child.values()):
            return f"a list, which has brackets: [{', '.join(map(str, child))}]"
        texts = isinstance(child, ListConfig) and all(isinstance(word, str) for word in child)
        return None if texts else "a list of texts"
    if child is None or isinstance(child, DictConfig | ListConfig):
        return WORDS.get(below, "a value")
    if below in (int, float) and isinstance(child, bool):
        return WORDS[below]
    if below in (int, float) and isinstance(child, int) and abs(child) > _largest(key, below):
        return f"at most {_largest(key, below):.10g}"
    return None


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _wanted(schema: type, full_key: str) -> str:
    """The type of a nested field in a reader's words."""
    hint: Any = schema
    for part in full_key.split("."):
        if not dataclasses.is_dataclass(hint):
            break
        hint = _resolved(hint).get(part.split("[")[0], hint)  # type: ignore[arg-type]
    if "dict" in str(hint):
        return "a block of settings"
    return WORDS.get(hint, "a list" if "list" in str(hint) else str(getattr(hint, "__name__", hint)))


def _resolved(schema: type) -> dict[str, Any]:
    """Field types with ``Optional[X]`` as X."""
    hints = typing.get_type_hints(schema)
    return {name: next((a for a in get_args(t) if a is not type(None)), t) if _optional(t) else t for name, t in hints.items()}


def _optional(hint: Any) -> bool:
    return type(None) in get_args(hint)


def _check_values(block: Any, path: str, shown: str, where: str, found: Mistakes) -> None:
    for f in dataclasses.fields(block):
        value, key, name = getattr(block, f.name), f"{path}.{f.name}", f"{shown}.{f.name}"
        if dataclasses.is_dataclass(value):
            _check_values(value, key, name, where, found)
        elif value is not None and key in CHOICES:
            for word in value if isinstance(value, list) else [value]:
                if word not in CHOICES[key]:
                    allowed = ", ".join(CHOICES[key])
                    hint = did_you_mean(str(word), CHOICES[key])
                    found.add(f"{name} is {word!r}, but must be one of {allowed}.{hint}{in_file(where)}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            largest = _largest(key, type(value))
            low, high = RANGES.get(key, (0 if isinstance(value, int) else -largest, INFINITE))
            if not low <= value <= high:
                allowed = f"at least {low:.10g}" if high == INFINITE else f"between {low:g} and {high:g}"
                found.add(f"{name} is {value}, but must be {allowed}.{in_file(where)}")
            elif value > largest:
                found.add(f"{name} is {value}, but must be at most {largest:.10g}.{in_file(where)}")


def _largest(key: str, kind: type) -> float:
    if kind is float:
        return LARGEST_FLOAT
    return LARGEST_SEED if key == "run.seed" else LARGEST
