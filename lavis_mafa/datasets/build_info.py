"""Reading a builder's ``build_info``: every wrong key or value is a UserError that names it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from lavis_mafa.common.errors import UserError, did_you_mean


def own_files(where: str, info: DictConfig, splits: tuple[str, ...]) -> tuple[dict[str, list[Path]], Path, int | None]:
    """The annotation files of the splits that have some, the image folder, and how many rows to keep."""
    check_keys(f"{where}.annotations", info.annotations, splits)
    check_keys(f"{where}.images", info.images, ("storage", "allow_absolute_paths"))
    files = {split: _paths(info.annotations.get(split)) for split in splits}
    if not any(files.values()):
        raise UserError(f"{where}.annotations.{splits[0]}.storage is not set; allowed: a path or a list of paths.")
    root = info.images.get("storage")
    if root is None:
        raise UserError(f"{where}.images.storage is not set; allowed: the folder that image paths start from.")
    limit = count(f"{where}.max_images", info.get("max_images"))
    return {split: paths for split, paths in files.items() if paths}, Path(root).expanduser(), limit


def allows_absolute_paths(where: str, info: DictConfig) -> bool:
    """``images.allow_absolute_paths``: whether image paths may leave the image folder."""
    return yes_or_no(f"{where}.images.allow_absolute_paths", info.images.get("allow_absolute_paths", False))


def _paths(split: Any) -> list[Path]:
    storage = split.get("storage") if split is not None else None
    if storage is None:
        return []
    return [Path(path).expanduser() for path in (storage if isinstance(storage, ListConfig | list) else [storage])]


def count(key: str, value: Any) -> int | None:
    """``value`` if it is a number from 1, or None."""
    if value is not None and (not isinstance(value, int) or value < 1):
        raise UserError(f"{key} is {value}; allowed: a whole number from 1, or null for all.")
    return value


def one_of(key: str, value: Any, allowed: Iterable[str]) -> str:
    """``value`` if it is among ``allowed``."""
    allowed = list(allowed)
    if value not in allowed:
        raise UserError(f"{key} is '{value}'; allowed: {', '.join(allowed)}.{did_you_mean(str(value), allowed)}")
    return value


def yes_or_no(key: str, value: Any) -> bool:
    """``value`` if it is true or false."""
    if not isinstance(value, bool):
        raise UserError(f"{key} is {value!r}; allowed: true, false.")
    return value


def check_keys(where: str, block: DictConfig, allowed: Iterable[str]) -> None:
    """Nothing, if all keys of ``block`` are among ``allowed``."""
    allowed = list(allowed)
    for key in map(str, block):
        if key not in allowed:
            raise UserError(f"{where}.{key} is not a key; allowed: {', '.join(allowed)}.{did_you_mean(key, allowed)}")
