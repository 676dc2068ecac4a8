"""Reading a builder's ``build_info``: every wrong key or value is a UserError that names it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from lavis_mafa.config.storage import AnnotationFile, check_storage, storage_files
from lavis_mafa.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa  # slow, and a YAML is checked in a moment

BLOCK = ("data_type", "build_info", "vis_processor", "text_processor")  # of a data set of ours
LAVIS_BLOCK = (*BLOCK, "type", "dataset_card")
MODES = ("train", "eval")
KEYS = {
    "grit_pairs": ("annotations", "images", "max_images", "max_images_seed", "prefix_lm"),
    "grit_vqa": ("annotations", "images", "max_images", "max_images_seed"),
    "grit_emoji": ("root", "captions", "max_concepts", "view", "prefix_lm"),
}
SPLITS = {"grit_pairs": ("train", "val", "test"), "grit_vqa": ("val", "test"), "grit_emoji": ("train", "val", "test")}
TRAINING_FILES = {"fixed": "train.jsonl", "drawn": "train_captions.jsonl", "curated": "train_captions.jsonl"}
VIEWS = ("pairs", "questions")


def check_block(name: str, block: DictConfig) -> None:
    """The keys of a data set's whole block: a misspelt one would change nothing, without a word; raises UserError.

    Of data sets that are not ours, the keys above ``build_info`` and of the processors are known here.
    """
    where, allowed = f"datasets.{name}", BLOCK if name in KEYS else LAVIS_BLOCK
    inside = KEYS.get(name, ())
    for key in map(str, block):
        if key in inside and key not in allowed:
            raise UserError(f"{where}.{key} is not a key; it belongs below build_info: {where}.build_info.{key}.")
    check_keys(where, block, allowed)
    for part in ("vis_processor", "text_processor"):
        if isinstance(block.get(part), DictConfig):
            check_keys(f"{where}.{part}", block[part], MODES)


def check_lavis_info(name: str, info: DictConfig, defaults: DictConfig) -> None:
    """The keys of ``build_info`` of one of LAVIS's data sets, as far as its defaults tell them; raises UserError."""
    where = f"datasets.{name}.build_info"
    check_keys(where, info, defaults)
    for split, block in (info.get("annotations") or {}).items():
        if isinstance(block, DictConfig):
            check_keys(f"{where}.annotations.{split}", block, ("url", "storage", "md5"))
    for part in ("images", "videos", "features"):
        if isinstance(info.get(part), DictConfig):
            check_keys(f"{where}.{part}", info[part], ("storage", "url", "md5"))


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


def missing_files(where: str, files: dict[str, list[AnnotationFile]], root: Path) -> list[str]:
    """A message for each annotation file, and for each image folder, that is not there."""
    messages = []
    folders = {f"{where}.images.storage": root}
    for split, of_split in files.items():
        key = f"{where}.annotations.{split}.storage"
        messages += [f"{key}: {file.path}: no such annotation file." for file in of_split if not file.path.exists()]
        folders |= {f"{key}: {file.path}": file.images for file in of_split if file.images is not None}
    for key, folder in folders.items():
        if not folder.is_dir():
            messages.append(f"{key}: The image folder {folder} does not exist; it is what the image paths start from.")
    return messages


def own_files(
    where: str, info: DictConfig, splits: tuple[str, ...]
) -> tuple[dict[str, list[AnnotationFile]], Path, Callable[[pa.Table], pa.Table]]:
    """The annotation files of the splits that have some, the image folder, and what keeps ``max_images`` rows of a table.

    Raises:
        UserError: besides wrong forms, an annotation pattern or folder without files.
    """
    _check_files(where, info, splits)
    annotations, images = info.get("annotations", {}), info.get("images", {})
    storages = {split: (annotations.get(split) or {}).get("storage") for split in splits}
    files = {
        split: storage_files(f"{where}.annotations.{split}.storage", storage)
        for split, storage in storages.items()
        if storage is not None
    }
    if not any(files.values()):
        raise UserError(f"{where}.annotations.{splits[0]}.storage is not set; allowed: a path or a list of paths.")
    root = images.get("storage")
    if root is None:
        raise UserError(f"{where}.images.storage is not set; allowed: the folder that image paths start from.")
    limit, seed = info.get("max_images"), info.get("max_images_seed")
    return {split: paths for split, paths in files.items() if paths}, Path(root).expanduser(), lambda rows: kept(rows, limit, seed)


def kept(rows: pa.Table, limit: int | None, seed: int | None) -> pa.Table:
    """The first ``limit`` rows, or with a seed as many drawn at random, in the order of the file; None keeps all.

    Example:
        >>> kept(pa.table({"image": ["a", "b", "c"]}), 2, None)["image"].to_pylist()
        ['a', 'b']
    """
    if limit is None or limit >= len(rows):
        return rows
    if seed is None:
        return rows[:limit]
    import numpy as np

    return rows.take(np.sort(np.random.default_rng(seed).choice(len(rows), limit, replace=False)))


def _check_files(where: str, info: DictConfig, splits: tuple[str, ...]) -> None:
    annotations = _block(f"{where}.annotations", info.get("annotations", {}), "train: {storage: pairs.jsonl}")
    check_keys(f"{where}.annotations", annotations, splits)
    for split, block in annotations.items():
        key = f"{where}.annotations.{split}"
        if block is None:
            continue
        check_keys(key, _block(key, block, "storage: pairs.jsonl"), ("storage",))
        if block.get("storage") is not None:
            check_storage(f"{key}.storage", block.storage)
    images = _block(f"{where}.images", info.get("images", {}), "storage: FOLDER")
    check_keys(f"{where}.images", images, ("storage", "allow_absolute_paths"))
    root = images.get("storage")
    if root is not None and not isinstance(root, str):
        raise UserError(f"{where}.images.storage is {_plain(root)!r}; allowed: the folder that image paths start from.")
    yes_or_no(f"{where}.images.allow_absolute_paths", images.get("allow_absolute_paths", False))
    count(f"{where}.max_images", info.get("max_images"))
    seed = info.get("max_images_seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
        raise UserError(f"{where}.max_images_seed is {_plain(seed)!r}; allowed: a whole number from 0, or null for the first rows.")
    if seed is not None and info.get("max_images") is None:
        raise UserError(f"{where}.max_images_seed is {seed}, but max_images is null, so all rows are taken; set max_images.")


def _block(key: str, value: Any, example: str) -> Any:
    if not isinstance(value, DictConfig | dict):
        raise UserError(f"{key} is {_plain(value)!r}; allowed: a block, such as {{{example}}}.")
    return value


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def allows_absolute_paths(where: str, info: DictConfig) -> bool:
    """``images.allow_absolute_paths``: whether image paths may leave the image folder."""
    return yes_or_no(f"{where}.images.allow_absolute_paths", info.images.get("allow_absolute_paths", False))


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


def check_keys(where: str, block: Mapping[Any, Any] | DictConfig, allowed: Iterable[str]) -> None:
    """Nothing, if all keys of ``block`` are among ``allowed``."""
    allowed = list(allowed)
    for key in map(str, block):
        if key not in allowed:
            raise UserError(f"{where}.{key} is not a key; allowed: {', '.join(allowed)}.{did_you_mean(key, allowed)}")
