"""Reading a builder's ``build_info``: every wrong key or value is a UserError that names it."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from lavis_mafa.common.errors import UserError, did_you_mean

KEYS = {
    "grit_pairs": ("annotations", "images", "max_images", "prefix_lm"),
    "grit_vqa": ("annotations", "images", "max_images"),
    "grit_emoji": ("root", "captions", "max_concepts", "view", "prefix_lm"),
}
SPLITS = {"grit_pairs": ("train", "val", "test"), "grit_vqa": ("val", "test"), "grit_emoji": ("train", "val", "test")}
TRAINING_FILES = {"fixed": "train.jsonl", "drawn": "train_captions.jsonl", "curated": "train_captions.jsonl"}
VIEWS = ("pairs", "questions")


def check_info(name: str, info: DictConfig) -> None:
    """The keys of a data set of ours and the forms of their values; what is left out is not missed."""
    where = f"datasets.{name}.build_info"
    check_keys(where, info, KEYS[name])
    yes_or_no(f"{where}.prefix_lm", info.get("prefix_lm", False))
    if name == "grit_emoji":
        if not isinstance(info.get("root", ""), str):
            raise UserError(f"{where}.root is {_plain(info.root)!r}; allowed: the folder that `lavis-mafa build-emoji` wrote.")
        one_of(f"{where}.captions", info.get("captions", "fixed"), TRAINING_FILES)
        one_of(f"{where}.view", info.get("view", "pairs"), VIEWS)
        count(f"{where}.max_concepts", info.get("max_concepts"))
    else:
        _check_files(where, info, SPLITS[name])


def own_splits(name: str, block: Any) -> tuple[str, ...]:
    """The splits that a data set of ours has: with files of one's own, those that have a file; all where none is set yet."""
    if name == "grit_emoji":
        return SPLITS[name]
    with_files = [split for split in SPLITS[name] if OmegaConf.select(block, f"build_info.annotations.{split}.storage") is not None]
    return tuple(with_files) or SPLITS[name]


def missing_files(where: str, files: dict[str, list[Any]], root: Path) -> list[str]:
    """A message for each annotation file, and for the image folder, that is not there. A folder or a pattern may be several files."""
    messages = []
    for split, paths in files.items():
        for path in (Path(getattr(file, "path", file)) for file in paths):
            if not path.exists() and not (set("*?[") & set(str(path)) and glob.glob(str(path))):
                messages.append(f"{where}.annotations.{split}.storage: {path}: no such annotation file.")
    if not root.is_dir():
        messages.append(f"{where}.images.storage: The image folder {root} does not exist; it is what the image paths start from.")
    return messages


def own_files(where: str, info: DictConfig, splits: tuple[str, ...]) -> tuple[dict[str, list[Path]], Path, int | None]:
    """The annotation files of the splits that have some, the image folder, and how many rows to keep."""
    _check_files(where, info, splits)
    annotations, images = info.get("annotations", {}), info.get("images", {})
    files = {split: _paths(annotations.get(split)) for split in splits}
    if not any(files.values()):
        raise UserError(f"{where}.annotations.{splits[0]}.storage is not set; allowed: a path or a list of paths.")
    root = images.get("storage")
    if root is None:
        raise UserError(f"{where}.images.storage is not set; allowed: the folder that image paths start from.")
    return {split: paths for split, paths in files.items() if paths}, Path(root).expanduser(), info.get("max_images")


def _check_files(where: str, info: DictConfig, splits: tuple[str, ...]) -> None:
    annotations = _block(f"{where}.annotations", info.get("annotations", {}), "train: {storage: pairs.jsonl}")
    check_keys(f"{where}.annotations", annotations, splits)
    for split, block in annotations.items():
        key = f"{where}.annotations.{split}"
        storage = None if block is None else _block(key, block, "storage: pairs.jsonl").get("storage")
        paths = storage if isinstance(storage, ListConfig | list) else [storage]
        if storage is not None and not all(isinstance(path, str) for path in paths):
            raise UserError(f"{key}.storage is {_plain(storage)!r}; allowed: a path or a list of paths.")
    images = _block(f"{where}.images", info.get("images", {}), "storage: FOLDER")
    check_keys(f"{where}.images", images, ("storage", "allow_absolute_paths"))
    root = images.get("storage")
    if root is not None and not isinstance(root, str):
        raise UserError(f"{where}.images.storage is {_plain(root)!r}; allowed: the folder that image paths start from.")
    yes_or_no(f"{where}.images.allow_absolute_paths", images.get("allow_absolute_paths", False))
    count(f"{where}.max_images", info.get("max_images"))


def _block(key: str, value: Any, example: str) -> Any:
    if not isinstance(value, DictConfig | dict):
        raise UserError(f"{key} is {_plain(value)!r}; allowed: a block, such as {{{example}}}.")
    return value


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


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
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise UserError(f"{key} is {_plain(value)}; allowed: a whole number from 1, or null for all.")
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
        raise UserError(f"{key} is {_plain(value)!r}; allowed: true, false.")
    return value


def check_keys(where: str, block: DictConfig, allowed: Iterable[str]) -> None:
    """Nothing, if all keys of ``block`` are among ``allowed``."""
    allowed = list(allowed)
    for key in map(str, block):
        if key not in allowed:
            raise UserError(f"{where}.{key} is not a key; allowed: {', '.join(allowed)}.{did_you_mean(key, allowed)}")
