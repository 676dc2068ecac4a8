"""From what a user wrote to a checked, typed block: unknown keys, wrong types, values out of their choices or range."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, get_args

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_mafa.common.errors import UserError, did_you_mean
from lavis_mafa.common.model_settings import AlbefBlock, Blip2Block, Blip2OptBlock, BlipBlock
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
    shown = shown or name
    schema = check_keys(name, values, where, shown)
    try:
        block = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except OmegaConfBaseException as error:
        key = f"{shown}.{error.full_key}" if error.full_key else shown
        got = OmegaConf.select(values, error.full_key) if error.full_key else values
        raise UserError(f"{key} is {got!r}, but must be {_wanted(schema, error.full_key or '')}.{in_file(where)}") from error
    _check_values(block, name, shown, where)
    return block


def check_keys(name: str, values: DictConfig, where: str = "", shown: str = "") -> Any:
    """The schema of a block whose keys it knows, and whose blocks and lists are where it has them.

    Raises:
        UserError: an unknown key, or something else where a block belongs.
    """
    schema = RUN_BLOCKS[values.get("task", "mafa_pretrain")] if name == "run" else MODEL_BLOCKS[values.get("arch", "albef_mafa")]
    _no_unknown_keys(schema, values, shown or name, where)
    return schema


def in_file(where: str) -> str:
    """`` (where)``, or nothing."""
    return f" ({where})" if where else ""


def _no_unknown_keys(schema: type, values: DictConfig, path: str, where: str) -> None:
    fields = {f.name: f.type for f in dataclasses.fields(schema)}
    hints = _resolved(schema)
    for key in map(str, values):
        if key not in fields:
            allowed = ", ".join(sorted(fields))
            hint = did_you_mean(key, fields)
            raise UserError(f"{path}.{key} is not a setting.{hint} Allowed: {allowed}.{in_file(where)}")
        below = hints[key]
        child = values[key] if not OmegaConf.is_missing(values, key) else None
        if dataclasses.is_dataclass(below) and isinstance(below, type):
            if isinstance(child, DictConfig):
                _no_unknown_keys(below, child, f"{path}.{key}", where)
            elif child is not None or "Optional" not in str(fields[key]):
                raise UserError(f"{path}.{key} is {_plain(child)!r}, but must be a block of settings.{in_file(where)}")
        elif str(below).startswith("dict") and child is not None and not isinstance(child, DictConfig):
            raise UserError(f"{path}.{key} is {_plain(child)!r}, but must be a block of settings.{in_file(where)}")
        elif str(below).startswith("list") and isinstance(child, ListConfig) and not all(isinstance(word, str) for word in child):
            raise UserError(f"{path}.{key} is {_plain(child)!r}, but must be a list of texts.{in_file(where)}")
        elif (
            below in (int, float)
            and isinstance(child, int)
            and (isinstance(child, bool) or abs(child) > _largest(f"{path}.{key}", below))
        ):
            allowed = _wanted(schema, key) if isinstance(child, bool) else f"at most {_largest(f'{path}.{key}', below):.10g}"
            raise UserError(f"{path}.{key} is {str(child)[:40]}, but must be {allowed}.{in_file(where)}")


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _wanted(schema: type, full_key: str) -> str:
    """The type of a nested field in a reader's words."""
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    hint: Any = schema
    for part in full_key.split("."):
        if not dataclasses.is_dataclass(hint):
            break
        hint = _resolved(hint).get(part.split("[")[0], hint)  # type: ignore[arg-type]
    if "dict" in str(hint):
        return "a block of settings"
    return words.get(hint, "a list" if "list" in str(hint) else str(getattr(hint, "__name__", hint)))


def _resolved(schema: type) -> dict[str, Any]:
    """Field types with ``Optional[X]`` as X."""
    hints = typing.get_type_hints(schema)
    return {name: next((a for a in get_args(t) if a is not type(None)), t) if _optional(t) else t for name, t in hints.items()}


def _optional(hint: Any) -> bool:
    return type(None) in get_args(hint)


def _check_values(block: Any, path: str, shown: str, where: str) -> None:
    for f in dataclasses.fields(block):
        value, key, name = getattr(block, f.name), f"{path}.{f.name}", f"{shown}.{f.name}"
        if dataclasses.is_dataclass(value):
            _check_values(value, key, name, where)
        elif value is not None and key in CHOICES:
            for word in value if isinstance(value, list) else [value]:
                if word not in CHOICES[key]:
                    allowed = ", ".join(CHOICES[key])
                    hint = did_you_mean(str(word), CHOICES[key])
                    raise UserError(f"{name} is {word!r}, but must be one of {allowed}.{hint}{in_file(where)}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            largest = _largest(key, type(value))
            low, high = RANGES.get(key, (0 if isinstance(value, int) else -largest, INFINITE))
            if not low <= value <= high:
                allowed = f"at least {low:.10g}" if high == INFINITE else f"between {low:g} and {high:g}"
                raise UserError(f"{name} is {value}, but must be {allowed}.{in_file(where)}")
            if value > largest:
                raise UserError(f"{name} is {value}, but must be at most {largest:.10g}.{in_file(where)}")


def _largest(key: str, kind: type) -> float:
    if kind is float:
        return LARGEST_FLOAT
    return LARGEST_SEED if key == "run.seed" else LARGEST
