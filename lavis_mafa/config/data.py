"""The ``datasets:`` block: what our data sets and processors may be told, and which files an annotation storage names.

Imports neither torch nor LAVIS, so that a YAML is checked in a moment.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lavis_mafa.config.read import plain
from lavis_mafa.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

Rule = tuple[str, Callable[[Any], bool]]  # what is allowed, and whether a value is


def _whole(value: Any, low: int, high: float = float("inf")) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _one_of(*allowed: str) -> Rule:
    return ", ".join(allowed), lambda value: isinstance(value, str) and value in allowed


_TRUE_OR_FALSE: Rule = ("true, false", lambda value: isinstance(value, bool))
_COUNT: Rule = ("a whole number from 1, or null for all", lambda value: value is None or _whole(value, 1))
_BLOCK: Rule = ("a block, such as {train: {storage: pairs.jsonl}}", lambda value: isinstance(value, dict))
_IMAGE_FOLDER: Rule = ("the folder that image paths start from", lambda value: value is None or isinstance(value, str))


def check_values(where: str, values: Mapping[Any, Any], rules: Mapping[str, Rule], of: str = "") -> None:
    """Nothing, if each key of a block is known and its value allowed; raises UserError."""
    check_keys(where, values, rules, of)
    for key, value in values.items():
        allowed, fits = rules[key]
        if not fits(value):
            near = did_you_mean(value, allowed.split(", ")) if isinstance(value, str) else ""
            raise UserError(f"{where}.{key} is {value!r}; allowed: {allowed}.{near}")


def check_keys(where: str, block: Iterable[Any], allowed: Iterable[str], of: str = "") -> None:
    """Nothing, if all keys of ``block`` are among ``allowed``; raises UserError."""
    allowed = list(allowed)
    for key in map(str, block):
        if key not in allowed:
            raise UserError(f"{where}.{key} is not a key{of}; allowed: {', '.join(allowed)}.{did_you_mean(key, allowed)}")


# --- data sets ---------------------------------------------------------------------------------------------------------

TRAINING_FILES = {"fixed": "train.jsonl", "drawn": "train_captions.jsonl", "curated": "train_captions.jsonl"}
SCENE_FILES = {"web": "train.parquet", "curated": "curated.parquet"}
ENTAILMENT = ("contradiction", "neutral", "entailment")  # labels, in the order of their numbers; LAVIS's order
STATEMENT = ("False", "True")  # likewise, of statements about two images
SPLITS = {
    "grit_pairs": ("train", "val", "test"),
    "grit_vqa": ("train", "val", "test"),
    "grit_entailment": ("train", "val", "test"),
    "grit_statements": ("train", "val", "test"),
    "grit_boxes": ("train", "val", "testA", "testB", "test"),
    "grit_emoji": ("train", "val", "test"),
    "grit_scenes": ("train", "val", "test", "unseen"),
}
COLUMNS = {  # that build_info.columns may rename
    "grit_pairs": ("image", "caption", "image_id", "concept", "same_image"),
    "grit_vqa": ("image", "question", "answer", "question_id"),
    "grit_entailment": ("image", "sentence", "label", "sentence_id"),
    "grit_statements": ("images", "image0", "image1", "sentence", "label", "sentence_id"),
    "grit_boxes": ("image", "text", "box", "boxes", "expression_id"),
}
_ROWS: dict[str, Rule] = {
    "annotations": _BLOCK,
    "columns": ("a block, such as {image: filepath, caption: title}, or null", lambda value: isinstance(value, dict | None)),
    "images": ("a block, such as {storage: FOLDER}", lambda value: isinstance(value, dict)),
    "max_images": _COUNT,
    "max_images_seed": ("a whole number from 0, or null for the first rows", lambda value: value is None or _whole(value, 0)),
}
INFO: dict[str, dict[str, Rule]] = {  # keys of build_info
    "grit_pairs": {**_ROWS, "prefix_lm": _TRUE_OR_FALSE},
    "grit_vqa": _ROWS,
    "grit_entailment": _ROWS,
    "grit_statements": _ROWS,
    "grit_boxes": _ROWS,
    "grit_scenes": {
        "root": ("the folder that `lavis-mafa build-scenes` wrote", lambda value: isinstance(value, str)),
        "captions": _one_of(*SCENE_FILES),
        "view": _one_of("pairs", "questions"),
        "prefix_lm": _TRUE_OR_FALSE,
        "max_images": _COUNT,
    },
    "grit_emoji": {
        "root": ("the folder that `lavis-mafa build-emoji` wrote", lambda value: isinstance(value, str)),
        "captions": _one_of(*TRAINING_FILES),
        "max_concepts": _COUNT,
        "view": _one_of("pairs", "questions"),
        "prefix_lm": _TRUE_OR_FALSE,
    },
}
BLOCK = ("data_type", "build_info", "vis_processor", "text_processor")  # of a data set of ours
OF_LAVIS: dict[str, dict[str, Rule]] = {  # what we add to build_info of LAVIS's data sets
    "vg_vqa": {"answer_weight": ("a number from 0 to 1, of each answer", lambda value: _number(value, 0, 1))}
}
LAVIS_BLOCK = (*BLOCK, "type", "dataset_card")
IMAGES: dict[str, Rule] = {"storage": _IMAGE_FOLDER, "allow_absolute_paths": _TRUE_OR_FALSE}


def check_block(name: str, block: Mapping[str, Any]) -> None:
    """The keys of a data set's whole block: a misspelt one would change nothing, without a word; raises UserError.

    Of data sets that are not ours, the keys above ``build_info`` and of the processors are known here.
    """
    where, allowed = f"datasets.{name}", BLOCK if name in INFO else LAVIS_BLOCK
    for key in map(str, block):
        if key in INFO.get(name, ()):
            raise UserError(f"{where}.{key} is not a key; it belongs below build_info: {where}.build_info.{key}.")
    check_keys(where, block, allowed)
    for part in ("vis_processor", "text_processor"):
        check_keys(f"{where}.{part}", block.get(part) or {}, ("train", "eval"))


def check_lavis_info(name: str, info: Mapping[str, Any], defaults: Iterable[str]) -> None:
    """The keys of ``build_info`` of one of LAVIS's data sets, as far as its defaults tell them; raises UserError."""
    where, info, more = f"datasets.{name}.build_info", plain(info), OF_LAVIS.get(name, {})
    check_keys(where, info, [*map(str, defaults), *more])
    check_values(where, {key: info[key] for key in more if key in info}, more)
    blocks = {f"annotations.{split}": block for split, block in (info.get("annotations") or {}).items()}
    blocks |= {part: info.get(part) for part in ("images", "videos", "features")}
    for key, block in blocks.items():
        check_keys(f"{where}.{key}", block if isinstance(block, dict) else (), ("url", "storage", "md5"))


def check_info(name: str, info: Mapping[str, Any]) -> None:
    """The keys of a data set of ours and the forms of their values; what is left out is not missed. Raises UserError."""
    where, info = f"datasets.{name}.build_info", plain(info)
    check_values(where, info, INFO[name])
    for split, block in info.get("annotations", {}).items():
        key = f"{where}.annotations.{split}"
        check_keys(f"{where}.annotations", [split], SPLITS[name])
        if not isinstance(block, dict | None):
            raise UserError(f"{key} is {block!r}; allowed: a block, such as {{storage: pairs.jsonl}}.")
        check_keys(key, block or (), ("storage",))
        if block and block.get("storage") is not None:
            check_storage(f"{key}.storage", block["storage"])
        for entry in storage if isinstance(storage := (block or {}).get("storage"), list) else [storage]:
            if isinstance(entry, dict):
                check_columns(f"{key}.storage.columns", entry.get("columns"), COLUMNS[name])
    check_columns(f"{where}.columns", info.get("columns"), COLUMNS.get(name, ()))
    check_values(f"{where}.images", info.get("images", {}), IMAGES)
    if info.get("max_images_seed") is not None and info.get("max_images") is None:
        seed = info["max_images_seed"]
        raise UserError(f"{where}.max_images_seed is {seed}, but max_images is null, so all rows are taken; set max_images.")


def check_columns(key: str, columns: Mapping[str, Any] | None, allowed: Sequence[str]) -> None:
    """Our names of columns, each with the one that a file has for it; raises UserError."""
    check_keys(key, columns or {}, allowed)
    for name, theirs in (columns or {}).items():
        if not isinstance(theirs, str) or not theirs:
            raise UserError(f"{key}.{name} is {theirs!r}, but must be the name of a column.")
    given = [(columns or {}).get(name, name) for name in allowed]
    if twice := next((name for name in given if given.count(name) > 1), None):
        first, other = (name for name, theirs in zip(allowed, given, strict=True) if theirs == twice)
        raise UserError(f"{key}: {first} and {other} are both read from the column {twice!r}; allowed: a column each.")


def own_splits(name: str, block: Mapping[str, Any]) -> tuple[str, ...]:
    """The splits that a data set of ours has: with files of one's own, those that have a file; all where none is set yet."""
    annotations = (block.get("build_info") or {}).get("annotations") or {}
    with_files = [split for split in SPLITS[name] if (annotations.get(split) or {}).get("storage") is not None]
    return tuple(with_files) or SPLITS[name]


def own_files(
    where: str, info: Mapping[str, Any], splits: Sequence[str]
) -> tuple[dict[str, list[AnnotationFile]], Path, Callable[[pa.Table], pa.Table]]:
    """The annotation files of the splits that have some, the image folder, and what keeps ``max_images`` rows of a table.

    Args:
        where: the key of ``info``, for messages; ``info`` has been through :func:`check_info`.

    Raises:
        UserError: no file, no image folder (of .arrow files it is their own, if nothing else is said), or an annotation pattern or
            folder without files.
    """
    annotations, root = info.get("annotations") or {}, (info.get("images") or {}).get("storage")
    storages = {split: (annotations.get(split) or {}).get("storage") for split in splits}
    files = {
        split: storage_files(f"{where}.annotations.{split}.storage", storage, info.get("columns"))
        for split, storage in storages.items()
        if storage is not None
    }
    files = {split: paths for split, paths in files.items() if paths}
    if not files:
        raise UserError(f"{where}.annotations.{splits[0]}.storage is not set; allowed: a path or a list of paths.")
    if root is None:  # an index of shards that lies beside them, or a file that holds the images
        beside = {file.path.parent if ending(file.path) == ".arrow" else None for paths in files.values() for file in paths}
        root = beside.pop() if len(beside) == 1 else None
    if root is None:
        raise UserError(f"{where}.images.storage is not set; allowed: the folder that image paths start from.")
    limit, seed = info.get("max_images"), info.get("max_images_seed")
    return files, Path(root).expanduser(), lambda rows: kept(rows, limit, seed)


def kept(rows: pa.Table, limit: int | None, seed: int | None) -> pa.Table:
    """The first ``limit`` rows, or with a seed as many drawn at random, in the order of the file; None keeps all."""
    if limit is None or limit >= len(rows):
        return rows
    if seed is None:
        return rows[:limit]
    import numpy as np

    return rows.take(np.sort(np.random.default_rng(seed).choice(len(rows), limit, replace=False)))


def allows_absolute_paths(where: str, info: Mapping[str, Any]) -> bool:
    """``images.allow_absolute_paths``: whether image paths may leave the image folder."""
    return bool((info.get("images") or {}).get("allow_absolute_paths", False))


def missing_files(name: str, block: Mapping[str, Any]) -> list[str]:
    """A message for each annotation file and image folder of a data set of ours, with its defaults, that is not there.

    Raises:
        UserError: no file is named.
    """
    where, info = f"datasets.{name}.build_info", block["build_info"]
    if name == "grit_scenes":
        needed = "questions_val.parquet" if info.get("view") == "questions" else "train.parquet"
        built = (Path(info["root"]) / needed).is_file()
        return [] if built else [f"{info['root']} holds no scenes; build them once with: lavis-mafa build-scenes {info['root']}"]
    if name == "grit_emoji":
        built = (Path(info["root"]) / "truth.parquet").is_file()
        return [] if built else [f"{info['root']} holds no emoji data; build them once with: lavis-mafa build-emoji {info['root']}"]
    files, root, _ = own_files(where, info, SPLITS[name])
    messages, folders = [], {f"{where}.images.storage": root}
    for split, of_split in files.items():
        key = f"{where}.annotations.{split}.storage"
        messages += [f"{key}: {file.path}: no such annotation file." for file in of_split if not file.path.exists()]
        folders |= {f"{key}: {file.path}": file.images for file in of_split if file.images is not None}
    for key, folder in folders.items():
        if not folder.is_dir():
            messages.append(f"{key}: The image folder {folder} does not exist; it is what the image paths start from.")
    return messages


# --- annotation files --------------------------------------------------------------------------------------------------

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
FORMS = (
    "a path or a list of paths, also of folders and patterns (shards/*.parquet), or in it {annotations: PATH, images: FOLDER, "
    "columns: BLOCK}"
)
OF_AN_ENTRY = ("annotations", "images", "columns")


class AnnotationFile(NamedTuple):
    """A file of annotations, the folder that its image paths start from where that is not the data set's, and what it calls columns."""

    path: Path
    images: Path | None = None
    columns: Mapping[str, str] = {}

    def __str__(self) -> str:
        return str(self.path)


def check_storage(key: str, storage: Any) -> None:
    """The form alone, not whether the files are there; raises UserError."""
    for entry in storage if isinstance(storage, list) else [storage]:
        unknown = [str(name) for name in entry if name not in OF_AN_ENTRY] if isinstance(entry, dict) else []
        texts = [entry.get("annotations"), entry.get("images", ".")] if isinstance(entry, dict) else [entry]
        if unknown or not all(isinstance(text, str) and text for text in texts):
            near = did_you_mean(unknown[0], OF_AN_ENTRY) if unknown else ""
            raise UserError(f"{key} is {storage!r}; allowed: {FORMS}.{near}")


def storage_files(key: str, storage: Any, columns: Mapping[str, str] | None = None) -> list[AnnotationFile]:
    """All files that a storage names, in its order; those of a folder or a pattern sorted by name. ``columns`` are those of entries
    without their own.

    Raises:
        UserError: the form is wrong, a pattern matches nothing, or a folder holds no annotations or several kinds of them.
    """
    storage = plain(storage)
    check_storage(key, storage)
    found = []
    for entry in storage if isinstance(storage, list) else [storage]:
        path, images, named = entry, None, columns
        if isinstance(entry, dict):
            path, images, named = entry["annotations"], entry.get("images"), entry.get("columns", columns)
        folder = None if images is None else Path(images).expanduser()
        found += [AnnotationFile(file, folder, named or {}) for file in files_of(Path(path), key)]
    return found


def files_of(path: Path, key: str) -> list[Path]:
    """The file itself; of a folder the annotation files in it, and of a pattern (``*``, ``?``, ``**``) those that match."""
    path = path.expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            splits = ", ".join(sorted(str(one.parent) for one in path.glob("*/dataset_info.json")))
            raise UserError(f"{key}: {path} holds several splits, as Hugging Face's datasets saves them; name one: {splits}.")
        saved = (path / "dataset_info.json").is_file()  # by Hugging Face's datasets, beside its data
        allowed = (".arrow",) if saved else ENDINGS
        files = sorted(file for file in path.iterdir() if ending(file) in allowed and file.is_file())
        kinds = sorted({ending(file) for file in files})
        if not files:
            raise UserError(f"{key}: the folder {path} holds no annotation file; allowed: {', '.join(ENDINGS)}.")
        if len(kinds) > 1:
            raise UserError(f"{key}: the folder {path} holds {' and '.join(kinds)} files; name one kind, such as {path}/*{kinds[0]}.")
        return files
    if glob.has_magic(str(path)) and not path.exists():
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not files:
            raise UserError(f"{key}: no file matches {str(path)!r}.")
        return files
    return [path]


def ending(path: Path) -> str:
    """What says how to read a file: its ending in lower case, without the ``.gz`` of a compressed one."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def annotation_file(file: str | Path | AnnotationFile) -> AnnotationFile:
    """A path without an image folder of its own, where it is a path alone."""
    return file if isinstance(file, AnnotationFile) else AnnotationFile(Path(file))


# --- processors --------------------------------------------------------------------------------------------------------


def _three(value: Any, low: float) -> bool:
    return value is None or (isinstance(value, list | tuple) and len(value) == 3 and all(_number(one, low, 1e9) for one in value))


def _randaugment(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return value is None
    return set(value) == {"n", "m"} and _whole(value["n"], 0, 100) and _whole(value["m"], 0, 10)


def _distortions(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return value is None
    return set(value) == {"jitter", "grayscale", "blur"} and all(_number(one, 0, 1) for one in value.values())


_SHARE: Rule = ("a number from 0 to 1", lambda value: _number(value, 0, 1))
_SCALES: dict[str, Rule] = {"min_scale": _SHARE, "max_scale": _SHARE}
_IMAGE: dict[str, Rule] = {
    "image_size": ("a whole number from 1", lambda value: _whole(value, 1)),
    "mean": ("three numbers, or null", lambda value: _three(value, -1e9)),
    "std": ("three numbers above 0, or null", lambda value: _three(value, 1e-9)),
}
_WORDS: dict[str, Rule] = {"max_words": ("a whole number from 1", lambda value: _whole(value, 1))}
_CAPTION: dict[str, Rule] = {"prompt": ("a text", lambda value: isinstance(value, str)), **_WORDS}
SETTINGS: dict[str, dict[str, Rule]] = {
    "albef_image_train": {
        **_IMAGE,
        **_SCALES,
        "flip": _TRUE_OR_FALSE,
        "randaugment": ("{n: 2, m: 7} (m up to 10), or null", _randaugment),
        "distortions": ("{jitter: 0.8, grayscale: 0.2, blur: 0.5} (each from 0 to 1), or null", _distortions),
    },
    "albef_image_eval": _IMAGE,
    "albef_caption": _CAPTION,
    # LAVIS's own, which ignore a key that they do not know
    "blip_image_train": {**_IMAGE, **_SCALES},
    "blip2_image_train": {**_IMAGE, **_SCALES},
    "blip_image_eval": _IMAGE,
    "blip_caption": _CAPTION,
    "blip_question": _WORDS,
}


def check_processor(key: str, block: Mapping[str, Any]) -> None:
    """A processor's block below ``key``: its ``name`` is a text, and one that we know gets what it takes; raises UserError."""
    name = block.get("name")
    if not isinstance(name, str):
        example = "albef_caption" if ".text_processor." in key else f"albef_image_{'train' if key.endswith('.train') else 'eval'}"
        raise UserError(f"{key}.name is {name!r}, but must be a registered processor, such as {example}.")
    if name in SETTINGS:
        check_settings(name, block, key)


def check_settings(name: str, settings: Mapping[str, Any], where: str = "") -> None:
    """Nothing, if a processor can be built from these settings.

    Args:
        name: as registered.
        where: the block's key, for the message; by default the processor's name.

    Raises:
        UserError: an unknown key, a wrong value, or a processor of images for texts or the other way round.
    """
    settings, rules, where = plain(settings), SETTINGS[name], where or name
    for part, of_images in ((".vis_processor.", True), (".text_processor.", False)):
        if part in where and ("image_size" in rules) != of_images:
            takes = "images" if "image_size" in rules else "texts"
            known = ", ".join(other for other, of_other in SETTINGS.items() if ("image_size" in of_other) == of_images)
            raise UserError(f"{where}.name is {name!r}, which is of {takes}; allowed here: {known}, or another of LAVIS's.")
    check_values(where, {key: value for key, value in settings.items() if key != "name"}, rules, f" of {name}")
    low, high = settings.get("min_scale", 0.2 if name.startswith("albef") else 0.5), settings.get("max_scale", 1)
    if low > high:
        raise UserError(f"{where}.min_scale is {low}; allowed: at most max_scale ({high}).")
