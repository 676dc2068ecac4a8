"""Check a YAML before anything slow happens: unknown keys, wrong types, ranges, impossible combinations."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_mafa.common.errors import UserError, did_you_mean
from lavis_mafa.common.settings import BLOCKS, CHOICES, INFINITE, RANGES, Grit, ModelBlock, RunBlock


def typed_block(name: str, values: DictConfig | dict[str, Any], where: str = "") -> Any:
    """A checked instance of the block ``name`` (``model`` or ``run``) with defaults filled in.

    Args:
        name: key in :data:`lavis_mafa.common.settings.BLOCKS`.
        values: what the user wrote, already merged with the model type's defaults.
        where: the file, for the message.

    Raises:
        UserError: an unknown key, a wrong type, a value outside its choices or range.
    """
    schema = BLOCKS[name]
    values = values if isinstance(values, DictConfig) else OmegaConf.create(values)
    _no_unknown_keys(schema, values, name, where)
    try:
        block = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except OmegaConfBaseException as error:
        key = f"{name}.{error.full_key}" if error.full_key else name
        got = OmegaConf.select(values, error.full_key) if error.full_key else values
        raise UserError(f"{key} is {got!r}, but must be {_wanted(schema, error.full_key or '')}.{_file(where)}") from error
    _check_values(block, name, where)
    return block


def check_combinations(model: ModelBlock | None, run: RunBlock | None, where: str = "", files: bool = True) -> None:
    """Settings that are fine alone but impossible together.

    Args:
        files: False leaves out the checkpoints that only the user can name (a YAML is shipped without them).

    Raises:
        UserError: the first one found.
    """
    end = _file(where)
    if model is not None:
        check_model(model, where)
    if model is not None and files:
        check_checkpoints(model, run, where)
    if run is None:
        return
    if run.grit.enabled:
        check_grit(run.grit, run.batch_size_train, where)
    if run.precision == "fp16" and run.device == "cpu":
        raise UserError(f"run.precision is fp16, but run.device is cpu; allowed there: fp32, bf16.{end}")
    if model is not None and model.itc.smooth_when == "grouped" and not run.grit.enabled and model.itc.smoothing > 0:
        raise UserError(
            f"model.itc.smoothing is {model.itc.smoothing} with smooth_when: grouped, but run.grit.enabled is false, so it "
            f"would never start; set smoothing: 0 or smooth_when: always.{end}"
        )


def check_model(model: ModelBlock, where: str = "") -> None:
    """The combinations inside ``model:``; raises UserError."""
    end = _file(where)
    ecm, con_d = model.ecm, model.discriminator
    if ecm.ambiguous_from > ecm.threshold:
        raise UserError(
            f"model.ecm.ambiguous_from is {ecm.ambiguous_from}, but must not exceed threshold ({ecm.threshold}); "
            f"equal switches the ambiguous class off.{end}"
        )
    if ecm.enabled and con_d is None:
        raise UserError(
            "model.ecm.enabled is true, but there is no model.discriminator (Con-D); give "
            f"{{arch: albef_retrieval, checkpoint: PATH}} or set ecm.enabled: false.{end}"
        )
    for part, encoder in (("image_encoder", model.image_encoder), ("text_encoder", model.text_encoder)):
        if encoder.width % encoder.heads:
            raise UserError(f"model.{part}.width is {encoder.width}, but must be a multiple of heads ({encoder.heads}).{end}")
    if model.image_encoder.image_size % model.image_encoder.patch_size:
        raise UserError(
            f"model.image_encoder.image_size is {model.image_encoder.image_size}, but must be a multiple of patch_size "
            f"({model.image_encoder.patch_size}).{end}"
        )
    if not 0 < model.text_encoder.fusion_layer < model.text_encoder.layers:
        raise UserError(
            f"model.text_encoder.fusion_layer is {model.text_encoder.fusion_layer}, but must lie between 1 and layers - 1 "
            f"({model.text_encoder.layers - 1}).{end}"
        )


def check_checkpoints(model: ModelBlock, run: RunBlock | None, where: str = "") -> None:
    """The checkpoints that a job cannot do without are named; raises UserError."""
    end, con_d = _file(where), model.discriminator
    if con_d is not None and con_d.arch != "ground_truth" and not con_d.checkpoint and model.ecm.enabled:
        raise UserError(
            "model.discriminator.checkpoint is null; an untrained Con-D is never used. "
            f"Set it to the file of a trained {con_d.arch} (--options model.discriminator.checkpoint=PATH).{end}"
        )
    if run is not None and run.evaluate and not model.pretrained:
        raise UserError(
            "model.pretrained is null, but run.evaluate is true, and an untrained model is not worth evaluating. "
            f"Set it to the checkpoint to evaluate (--options model.pretrained=PATH).{end}"
        )


def check_grit(grit: Grit, batch_size: int, where: str = "", prefix: str = "run.grit") -> None:
    """B <= M <= L and M divides L; raises UserError with the nearest allowed M."""
    end = _file(where)
    queue, space = grit.queue_size, grit.search_space
    if space > queue:
        raise UserError(f"{prefix}.search_space is {space}, but must not exceed queue_size ({queue}).{end}")
    if batch_size > space:
        raise UserError(f"run.batch_size_train is {batch_size}, but must not exceed {prefix}.search_space ({space}).{end}")
    if queue % space:
        divisors = [d for d in range(batch_size, queue + 1) if queue % d == 0] or [queue]
        nearest = min(divisors, key=lambda d: abs(d - space))
        raise UserError(f"{prefix}.search_space is {space}, but must divide queue_size ({queue}); nearest: {nearest}.{end}")


def _file(where: str) -> str:
    return f" ({where})" if where else ""


def _no_unknown_keys(schema: type, values: DictConfig, path: str, where: str) -> None:
    fields = {f.name: f.type for f in dataclasses.fields(schema)}
    hints = _resolved(schema)
    for key in map(str, values):
        if key not in fields:
            allowed = ", ".join(sorted(fields))
            hint = did_you_mean(key, fields)
            raise UserError(f"{path}.{key} is not a setting.{hint} Allowed: {allowed}.{_file(where)}")
        below = hints[key]
        child = values[key] if not OmegaConf.is_missing(values, key) else None
        if dataclasses.is_dataclass(below) and isinstance(below, type):
            if isinstance(child, DictConfig):
                _no_unknown_keys(below, child, f"{path}.{key}", where)
            elif child is not None or "Optional" not in str(fields[key]):
                got = OmegaConf.to_container(child) if isinstance(child, ListConfig) else child
                raise UserError(f"{path}.{key} is {got!r}, but must be a block of settings.{_file(where)}")


def _wanted(schema: type, full_key: str) -> str:
    """The type of a nested field in a reader's words."""
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    hint: Any = schema
    for part in full_key.split("."):
        if not dataclasses.is_dataclass(hint):
            break
        hint = _resolved(hint).get(part.split("[")[0], hint)  # type: ignore[arg-type]
    return words.get(hint, "a list" if "list" in str(hint) else str(getattr(hint, "__name__", hint)))


def _resolved(schema: type) -> dict[str, Any]:
    """Field types with ``Optional[X]`` as X."""
    import typing

    hints = typing.get_type_hints(schema)
    return {name: next((a for a in get_args(t) if a is not type(None)), t) if _optional(t) else t for name, t in hints.items()}


def _optional(hint: Any) -> bool:
    return type(None) in get_args(hint)


def _check_values(block: Any, path: str, where: str) -> None:
    for f in dataclasses.fields(block):
        value, key = getattr(block, f.name), f"{path}.{f.name}"
        if dataclasses.is_dataclass(value):
            _check_values(value, key, where)
        elif key in CHOICES:
            for word in value if isinstance(value, list) else [value]:
                if word not in CHOICES[key]:
                    allowed = ", ".join(CHOICES[key])
                    hint = did_you_mean(str(word), CHOICES[key])
                    raise UserError(f"{key} is {word!r}, but must be one of {allowed}.{hint}{_file(where)}")
        elif key in RANGES and value is not None:
            low, high = RANGES[key]
            if not low <= value <= high:
                allowed = f"at least {low:g}" if high == INFINITE else f"between {low:g} and {high:g}"
                raise UserError(f"{key} is {value}, but must be {allowed}.{_file(where)}")
