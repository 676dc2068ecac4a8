"""LAVIS's own data sets take annotations as they come: what a row lacks is a traceback, or a wrong metric. Here it is one message."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from omegaconf import DictConfig, OmegaConf

from lavis_mafa.config.data import SPLITS
from lavis_mafa.datasets.ids import id_of_json, is_missing_text
from lavis_mafa.errors import UserError

FORMS: dict[type, str] = {str: "a text", list: "a list of texts"}


@contextlib.contextmanager
def explained(datasets: DictConfig) -> Iterator[None]:
    """What LAVIS's builders raise inside, while they read ``datasets``, becomes a UserError that names file and row if one is wrong,
    or the file that cannot be downloaded."""
    try:
        yield
    except URLError as error:
        absent = [f"{where}: {path} is not there" for where, _, path in _files(datasets) if not path.is_file()]
        raise UserError(
            f"{[*absent, 'A file of the data is not there'][0]}, and cannot be downloaded here ({error.reason}); put it there."
        ) from error
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if not isinstance(error, UserError):
            for where, number, path in _files(datasets):
                # in evaluation, further files are others: lists of answers, the questions in their original form
                if path.is_file() and (number == 0 or ".annotations.train." in where):
                    _check_file(path, error)
        raise


def _files(datasets: DictConfig) -> Iterator[tuple[str, int, Path]]:
    """The annotation files of LAVIS's data sets: the key that names them, each one's number there, and its path."""
    from lavis.common.utils import get_cache_path

    for name in (name for name in map(str, datasets) if name not in SPLITS):
        for split, block in (OmegaConf.select(datasets[name], "build_info.annotations") or {}).items():
            storage = block.get("storage") if isinstance(block, DictConfig) else None
            for number, file in enumerate([storage] if isinstance(storage, str) else storage or []):
                yield f"datasets.{name}.build_info.annotations.{split}.storage", number, Path(get_cache_path(file))


def _check_file(path: Path, error: Exception) -> None:
    """A file that LAVIS's builder has read, once more; all that its own ``error`` names is a key."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as wrong:
        raise UserError(f"{path}: not valid JSON ({wrong}).") from error
    if not isinstance(rows, list):
        raise UserError(f"{path} holds {_shown(rows)}; allowed: a list of objects, such as {{image: ..., caption: ...}}.") from error
    needed = [str(error.args[0])] if isinstance(error, KeyError) and error.args else []
    for row, value in enumerate(rows, 1):
        where = f"{path}, row {row}"
        _check_object(where, value, ("image", "caption"))
        _id(where, value)
        captions = value.get("caption", "")
        if not _are_texts(captions):
            raise UserError(f"{where}: caption is {_shown(captions)}; allowed: a text, in a gallery a list of texts.") from error
        for missing in needed:
            if missing not in value:
                raise UserError(f"{where}: {missing} is missing; allowed: one in every row.") from error


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
            for row, value in enumerate(annotation if needed and isinstance(annotation, list) else [], 1):
                where = f"datasets.{name}, split {split!r}, row {row} of its annotations"
                _check_object(where, value, needed)
                for key, form in needed.items():
                    if not isinstance(value.get(key), form) or not _are_texts(value[key]):
                        raise UserError(f"{where}: {key} is {_shown(value.get(key))}; allowed: {FORMS[form]}.")
                if "images" in needed and len(value["images"]) != 2:
                    raise UserError(f"{where}: images is {_shown(value['images'])}; allowed: a list of two paths.")
                labels = getattr(dataset, "class_labels", None)
                if labels and "label" in needed and value["label"] not in labels:
                    raise UserError(f"{where}: label is {_shown(value['label'])}; allowed: {', '.join(labels)}.")


def _needed(dataset: Any) -> dict[str, type]:
    """What each row must have, by the classes of LAVIS that make samples of images."""
    from lavis.datasets.datasets.caption_datasets import CaptionDataset, CaptionEvalDataset
    from lavis.datasets.datasets.image_text_pair_datasets import ImageTextPairDataset
    from lavis.datasets.datasets.nlvr_datasets import NLVRDataset
    from lavis.datasets.datasets.retrieval_datasets import RetrievalDataset, RetrievalEvalDataset
    from lavis.datasets.datasets.snli_ve_datasets import SNLIVisualEntialmentDataset
    from lavis.datasets.datasets.vqa_datasets import VQADataset, VQAEvalDataset

    if isinstance(dataset, ImageTextPairDataset | CaptionDataset | RetrievalDataset):
        return {"image": str, "caption": str}
    if isinstance(dataset, RetrievalEvalDataset):
        return {"image": str, "caption": list}
    if isinstance(dataset, SNLIVisualEntialmentDataset):
        return {"image": str, "sentence": str, "label": str}
    if isinstance(dataset, NLVRDataset):
        return {"images": list, "sentence": str, "label": str}
    if isinstance(dataset, CaptionEvalDataset):
        return {"image": str}
    return {"image": str, "question": str} if isinstance(dataset, VQADataset | VQAEvalDataset) else {}


def image_keys(rows: list[Any], name: str) -> torch.Tensor:
    """LongTensor[N]: rows of the same ``image`` path share a key; where no row has a path, those of the same ``image_id``.

    Raises:
        UserError: a row has no path although others have, or an ``image_id`` is no id, or is that of another row's image.
    """
    by_path = any("image" in row for row in rows)
    numbers: dict[Any, int] = {}
    image_of: dict[str, tuple[str, int]] = {}
    keys = []
    for row, value in enumerate(rows, 1):
        where = f"{name}, row {row} of its annotations"
        image = one = _id(where, value)
        if by_path:
            image = value.get("image")
            if not isinstance(image, str) or not image:
                raise UserError(f"{where}: image is {image!r}; allowed: a path.")
            first, number = (image, row) if one is None else image_of.setdefault(one, (image, row))
            if first != image:
                raise UserError(
                    f"{where}: image_id {one!r} is that of {image!r} here, but of {first!r} in row {number}; allowed: one image an id."
                )
        keys.append(numbers.setdefault(row if image is None else image, len(numbers)))
    return torch.tensor(keys, dtype=torch.long)


def _id(where: str, row: dict[str, Any]) -> str | None:
    text, _ = id_of_json(f"{where}: image_id", row.get("image_id"))
    return None if text is None or is_missing_text(text) else text


def _check_object(where: str, row: Any, keys: Iterable[str]) -> None:
    if not isinstance(row, dict):
        raise UserError(f"{where}: {row!r:.60} is not an object; allowed: {{{', '.join(f'{key}: ...' for key in keys)}}}.")


def _are_texts(value: Any) -> bool:
    return all(isinstance(text, str) for text in (value if isinstance(value, list) else [value]))


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value)[:60]
