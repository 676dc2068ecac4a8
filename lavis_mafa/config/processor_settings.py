"""What our processors, and those of LAVIS that our YAMLs take, may be told.

Imports neither torch nor LAVIS, so that a YAML is checked in a moment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from lavis_mafa.errors import UserError, did_you_mean

Rule = tuple[str, Callable[[Any], bool]]  # what is allowed, and whether a value is


def _whole(value: Any, low: int, high: float = float("inf")) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _three(value: Any, low: float) -> bool:
    numbers = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 3
    return value is None or (numbers and all(_number(one, low, 1e9) for one in value))


def _randaugment(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return value is None
    return set(value) == {"n", "m"} and _whole(value["n"], 0, 100) and _whole(value["m"], 0, 10)


_SHARE: Rule = ("a number from 0 to 1", lambda value: _number(value, 0, 1))
_IMAGE: dict[str, Rule] = {
    "image_size": ("a whole number from 1", lambda value: _whole(value, 1)),
    "mean": ("three numbers, or null", lambda value: _three(value, -1e9)),
    "std": ("three numbers above 0, or null", lambda value: _three(value, 1e-9)),
}
_CAPTION: dict[str, Rule] = {
    "prompt": ("a text", lambda value: isinstance(value, str)),
    "max_words": ("a whole number from 1", lambda value: _whole(value, 1)),
}
SETTINGS: dict[str, dict[str, Rule]] = {
    "albef_image_train": {
        **_IMAGE,
        "min_scale": _SHARE,
        "max_scale": _SHARE,
        "flip": ("true, false", lambda value: isinstance(value, bool)),
        "randaugment": ("{n: 2, m: 7} (m up to 10), or null", _randaugment),
    },
    "albef_image_eval": _IMAGE,
    "albef_caption": _CAPTION,
    # LAVIS's own, which ignore a key that they do not know
    "blip_image_train": {**_IMAGE, "min_scale": _SHARE, "max_scale": _SHARE},
    "blip2_image_train": {**_IMAGE, "min_scale": _SHARE, "max_scale": _SHARE},
    "blip_image_eval": _IMAGE,
    "blip_caption": _CAPTION,
    "blip_question": {"max_words": _CAPTION["max_words"]},
}


def check_settings(name: str, settings: Mapping[str, Any], where: str = "") -> None:
    """Nothing, if a processor can be built from these settings.

    Args:
        name: as registered.
        settings: its YAML block.
        where: the block's key, for the message; by default the processor's name.

    Raises:
        UserError: an unknown key, a wrong value, or a processor of images for texts or the other way round.
    """
    rules, where = SETTINGS[name], where or name
    for part, of_images in ((".vis_processor.", True), (".text_processor.", False)):
        if part in where and ("image_size" in rules) != of_images:
            takes = "images" if "image_size" in rules else "texts"
            known = ", ".join(other for other, of_other in SETTINGS.items() if ("image_size" in of_other) == of_images)
            raise UserError(f"{where}.name is {name!r}, which is of {takes}; allowed here: {known}, or another of LAVIS's.")
    for key, value in settings.items():
        if key == "name":
            continue
        if key not in rules:
            raise UserError(f"{where}.{key} is not a key of {name}; allowed: {', '.join(rules)}.{did_you_mean(str(key), rules)}")
        allowed, fits = rules[key]
        if not fits(value):
            shown = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            raise UserError(f"{where}.{key} is {shown!r}; allowed: {allowed}.")
    low, high = settings.get("min_scale", 0.2 if name.startswith("albef") else 0.5), settings.get("max_scale", 1)
    if low > high:
        raise UserError(f"{where}.min_scale is {low}; allowed: at most max_scale ({high}).")
