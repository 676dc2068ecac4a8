"""LAVIS's own data sets take annotations as they come: what a row lacks is a traceback, or a wrong figure. Here it is one message."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from omegaconf import DictConfig, OmegaConf

from lavis_mafa.config.data import SPLITS
from lavis_mafa.datasets.ids import id_of_json, is_missing_text
from lavis_mafa.errors import UserError


@contextlib.contextmanager
def explained(datasets: DictConfig) -> Iterator[None]:
    """What LAVIS's builders raise inside, while they read ``datasets``, becomes a UserError that names file and row if one is wrong,
    or the file that cannot be downloaded."""
    try:
        yield
    except URLError as error:
        raise UserError(f"{_absent(datasets)}, and cannot be downloaded here ({error.reason}); put it there.") from error
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if not isinstance(error, UserError):
            for name in map(str, datasets):
                if name not in SPLITS:
                    _check_files(name, datasets[name].get("build_info"), error)
        raise


def read_checked(build: Callable[[Any], dict[str, dict[str, Any]]], cfg: Any) -> dict[str, dict[str, Any]]:
    """The data sets of a configuration by name and split, as ``build`` makes them, every row looked at.

    Raises:
        UserError: a file or a row that they cannot use.
    """
    with explained(cfg.datasets_cfg):
        datasets = build(cfg)
    check_rows(datasets)
    return datasets


def check_rows(datasets: dict[str, dict[str, Any]]) -> None:
    """Every row of LAVIS's data sets of images, by name and split, has what their samples are made of.

    Raises:
        UserError: naming the first row that lacks it, or whose caption has the wrong form: a list in training, a text in a gallery.
    """
    for name, parts in datasets.items():
        for split, dataset in parts.items():
            annotation = getattr(dataset, "annotation", None)
            needed = _needed(dataset)
            if needed and isinstance(annotation, list):
                for row, value in enumerate(annotation, 1):
                    _check_row(f"datasets.{name}, split {split!r}, row {row} of its annotations", value, needed)


def image_keys(rows: list[Any], name: str) -> torch.Tensor:
    """LongTensor[N]: rows of the same ``image`` path share a key; where no row has a path, those of the same ``image_id``.

    Raises:
        UserError: a row has no path although others have, or an ``image_id`` is no id, or is that of another row's image.
    """
    key = "image" if any("image" in row for row in rows) else "image_id"
    numbers: dict[Any, int] = {}
    image_of: dict[str, tuple[Any, int]] = {}
    keys = []
    for row, value in enumerate(rows, 1):
        where = f"{name}, row {row} of its annotations"
        one = _id(where, value)
        path = value.get(key) if key == "image" else one
        if key == "image" and (not isinstance(path, str) or not path):
            raise UserError(f"{where}: image is {path!r}; allowed: a path.")
        if one is not None and key == "image":
            first, number = image_of.setdefault(one, (path, row))
            if first != path:
                raise UserError(
                    f"{where}: image_id {one!r} is that of {path!r} here, but of {first!r} in row {number}; allowed: one image an id."
                )
        keys.append(numbers.setdefault(row if path is None else path, len(numbers)))
    return torch.tensor(keys, dtype=torch.long)


def _id(where: str, row: dict[str, Any]) -> str | None:
    text, _ = id_of_json(f"{where}: image_id", row.get("image_id"))
    return None if text is None or is_missing_text(text) else text


def _needed(dataset: Any) -> dict[str, type]:
    """What each row must have, by the classes of LAVIS that make samples of images."""
    from lavis.datasets.datasets.caption_datasets import CaptionDataset, CaptionEvalDataset
    from lavis.datasets.datasets.image_text_pair_datasets import ImageTextPairDataset
    from lavis.datasets.datasets.retrieval_datasets import RetrievalDataset, RetrievalEvalDataset
    from lavis.datasets.datasets.vqa_datasets import VQADataset, VQAEvalDataset

    if isinstance(dataset, ImageTextPairDataset | CaptionDataset | RetrievalDataset):
        return {"image": str, "caption": str}
    if isinstance(dataset, RetrievalEvalDataset):
        return {"image": str, "caption": list}
    if isinstance(dataset, CaptionEvalDataset):
        return {"image": str}
    return {"image": str, "question": str} if isinstance(dataset, VQADataset | VQAEvalDataset) else {}


FORMS: dict[type, str] = {str: "a text", list: "a list of texts"}


def _check_row(where: str, row: Any, needed: dict[str, type]) -> None:
    if not isinstance(row, dict):
        raise UserError(f"{where}: {row!r:.60} is not an object; allowed: {{{', '.join(f'{key}: ...' for key in needed)}}}.")
    for key, form in needed.items():
        value = row.get(key)
        texts = value if isinstance(value, list) else [value]
        if not isinstance(value, form) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: {key} is {_shown(value)}; allowed: {FORMS[form]}.")


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value)[:60]


def _absent(datasets: DictConfig) -> str:
    """The first annotation file that LAVIS's builders have to download."""
    from lavis.common.utils import get_cache_path

    for name in (name for name in map(str, datasets) if name not in SPLITS):
        for split, block in (OmegaConf.select(datasets[name], "build_info.annotations") or {}).items():
            for file in [block.storage] if isinstance(block.storage, str) else block.storage:
                if not Path(get_cache_path(file)).is_file():
                    return f"datasets.{name}.build_info.annotations.{split}.storage: {get_cache_path(file)} is not there"
    return "A file of the data is not there"


def _check_files(name: str, info: DictConfig | None, error: Exception) -> None:
    """The files that LAVIS's builder has read, once more; all that its own error names is a key."""
    from lavis.common.utils import get_cache_path

    for split, block in (OmegaConf.select(info, "annotations") or {}).items() if info is not None else ():
        storage = block.get("storage") if isinstance(block, DictConfig) else None
        files = [storage] if isinstance(storage, str) else list(storage or [])
        # in evaluation, further files are others: lists of answers, the questions in their original form
        for file in files if split == "train" else files[:1]:
            path = Path(get_cache_path(file))
            if path.is_file():
                _check_file(path, error)


def _check_file(path: Path, error: Exception) -> None:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as wrong:
        raise UserError(f"{path}: not valid JSON ({wrong}).") from error
    if not isinstance(rows, list):
        raise UserError(f"{path} holds {_shown(rows)}; allowed: a list of objects, such as {{image: ..., caption: ...}}.") from error
    missing = str(error.args[0]) if isinstance(error, KeyError) and error.args else None
    for row, value in enumerate(rows, 1):
        if not isinstance(value, dict):
            raise UserError(f"{path}, row {row}: {value!r:.60} is not an object; allowed: {{image: ..., caption: ...}}.") from error
        _id(f"{path}, row {row}", value)
        captions = value.get("caption", "")
        if not all(isinstance(text, str) for text in (captions if isinstance(captions, list) else [captions])):
            raise UserError(
                f"{path}, row {row}: caption is {_shown(captions)}; allowed: a text, in a gallery a list of texts."
            ) from error
        if missing is not None and missing not in value:
            raise UserError(f"{path}, row {row}: {missing} is missing; allowed: one in every row.") from error
