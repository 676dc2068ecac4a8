"""What ``check-data`` checks: annotation files with their image folder, from the command line or as the data of a YAML's run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from lavis_mafa.config.data import SPLITS, AnnotationFile, allows_absolute_paths, files_of, own_files
from lavis_mafa.errors import UserError

Process = Callable[[str], str]


@dataclass(frozen=True)
class Source:
    """Annotation files that share an image folder and a text processor."""

    files: tuple[AnnotationFile, ...]
    root: Path
    process: Process
    allow_absolute_paths: bool = False
    select: Callable[[pa.Table], pa.Table] = lambda rows: rows  # those that the data set keeps
    one_caption: bool = False  # a list of captions is none to this data set
    text: str | None = "caption"  # or question, or None where there is neither

    def __post_init__(self) -> None:
        for root in (self.root, *(file.images for file in self.files)):
            if root is not None and not root.is_dir():
                raise UserError(f"The image folder {root} does not exist; give the folder that the image paths start from.")


def from_files(files: Sequence[Path], root: Path, allow_absolute_paths: bool) -> list[Source]:
    """Files without a YAML; captions are cleaned as ``grit_pairs`` does by default."""
    with warnings.catch_warnings():  # of LAVIS's dependencies
        warnings.simplefilter("ignore")
        from lavis_mafa.processors import AlbefCaptionProcessor

    found = tuple(AnnotationFile(path) for file in files for path in files_of(file, "--annotations"))
    return [Source(found, root, AlbefCaptionProcessor(), allow_absolute_paths)]


def from_yaml(name: str, options: list[str]) -> list[Source]:
    """The data of every split that the YAML's run names, with their text processors. No model is built, so any device will do.

    Raises:
        UserError: a mistake in the YAML, or a data set without images in files, or without any of these splits.
    """
    from lavis_mafa.runners import job

    _, cfg = job.prepare(name, [*options, "run.device=cuda"], files=False, device=False)
    from lavis.common.registry import registry

    run = cfg.run_cfg
    keys = ("test_splits",) if run.get("evaluate") is True else ("train_splits", "valid_splits", "test_splits")
    defaults: dict[str, list[str]] = {"train_splits": ["train"]}
    splits = list(dict.fromkeys(split for key in keys for split in run.get(key, defaults.get(key)) or []))
    sources = []
    for dataset, config in cfg.datasets_cfg.items():
        builder = registry.get_builder_class(dataset)(config)
        builder.build_processors()
        where, of_dataset = f"datasets.{dataset}", []
        for split in splits:
            mode = "train" if split == "train" else "eval"
            find = FINDERS.get(dataset, _of_lavis)
            source = find(f"{where}.build_info", config.build_info, split, builder.text_processors[mode])
            if source is not None and source.process is None:
                raise UserError(f"{where}.text_processor.{mode} is missing; give it a name, such as albef_caption.")
            of_dataset += [] if source is None else [source]
        if not of_dataset:
            raise UserError(f"{where}.build_info names no annotations for the splits of this run ({', '.join(splits) or 'none'}).")
        sources += of_dataset
    return sources


def _own(name: str, text: str) -> Callable[[str, Any, str, Process], Source | None]:
    def find(where: str, info: Any, split: str, process: Process) -> Source | None:
        files, root, select = own_files(where, info, SPLITS[name])
        if split not in files:
            return None
        return Source(tuple(files[split]), root, process, allows_absolute_paths(where, info), select, text=text)

    return find


def _emoji(where: str, info: Any, split: str, process: Process) -> Source | None:
    from lavis_mafa.datasets.builders import GritEmojiBuilder

    root = Path(info.root).expanduser()
    files = {"train": GritEmojiBuilder.CAPTIONS[info.get("captions", "fixed")], "val": "seen.jsonl", "test": "unseen.jsonl"}
    return Source((AnnotationFile(root / files[split]),), root, process) if split in files else None


def _of_lavis(where: str, info: Any, split: str, process: Process) -> Source | None:
    """LAVIS's data sets keep rows in JSON lists; their image paths are not confined to the folder."""
    from lavis.common.utils import get_cache_path
    from omegaconf import OmegaConf

    root = OmegaConf.select(info, "images.storage")
    storage = OmegaConf.select(info, f"annotations.{split}.storage")
    if root is None:
        raise UserError(f"{where} names no images.storage, which check-data needs.")
    if storage is None:
        return None
    names = [storage] if isinstance(storage, str) else list(storage)
    # in evaluation, further files are others: lists of answers, the questions in their original form
    files = tuple(AnnotationFile(Path(get_cache_path(file))) for file in (names if split == "train" else names[:1]))
    text = _text_of(files[0].path)
    one = split == "train" and text == "caption"
    return Source(files, Path(get_cache_path(root)), process, True, one_caption=one, text=text)


def _text_of(path: Path) -> str | None:
    from lavis_mafa.analysis.data_check.records import read_records

    first = next(read_records(path), {}) if path.is_file() else {"caption": ""}
    return next((text for text in ("caption", "question") if text in first), "caption" if "image" not in first else None)


FINDERS: dict[str, Callable[[str, Any, str, Process], Source | None]] = {
    "grit_pairs": _own("grit_pairs", "caption"),
    "grit_vqa": _own("grit_vqa", "question"),
    "grit_emoji": _emoji,
}
