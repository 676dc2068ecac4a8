"""What ``check-data`` checks: annotation files with their image folder, from the command line or as the training sets of a YAML."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavis_mafa.common.errors import UserError
from lavis_mafa.datasets.build_info import allows_absolute_paths, own_files

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Source:
    """Annotation files that share an image folder and a text processor."""

    files: tuple[Path, ...]
    root: Path
    process: Callable[[str], str]
    allow_absolute_paths: bool = False
    limit: int | None = None  # the first rows only
    one_caption: bool = False  # a list of captions is none to this data set

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            raise UserError(f"The image folder {self.root} does not exist; give the folder that the image paths start from.")


def from_files(files: Sequence[Path], root: Path, allow_absolute_paths: bool) -> list[Source]:
    """Files without a YAML; captions are cleaned as ``grit_pairs`` does by default."""
    with warnings.catch_warnings():  # of LAVIS's dependencies
        warnings.simplefilter("ignore")
        from lavis_mafa.processors.albef_processors import AlbefCaptionProcessor

    return [Source(tuple(files), root, AlbefCaptionProcessor(), allow_absolute_paths)]


def from_yaml(name: str, options: list[str]) -> list[Source]:
    """The training sets of a YAML, with its text processors.

    Raises:
        UserError: a mistake in the YAML, or a data set without a training set of images and captions in files.
    """
    from lavis_mafa.common import job

    _, cfg = job.prepare(name, options, files=False)
    from lavis.common.registry import registry

    sources = []
    for dataset, config in cfg.datasets_cfg.items():
        builder = registry.get_builder_class(dataset)(config)
        builder.build_processors()
        process = builder.text_processors["train"]
        if process is None:
            raise UserError(f"datasets.{dataset}.text_processor.train is missing; give it a name, such as albef_caption.")
        find = FINDERS.get(dataset, _of_lavis)
        sources.append(find(f"datasets.{dataset}.build_info", config.build_info, process))
    return sources


def _pairs(where: str, info: Any, process: Callable[[str], str]) -> Source:
    files, root, limit = own_files(where, info, SPLITS)
    if "train" not in files:
        raise UserError(f"{where}.annotations.train.storage is not set, so there is no training set to check.")
    return Source(tuple(files["train"]), root, process, allows_absolute_paths(where, info), limit)


def _emoji(where: str, info: Any, process: Callable[[str], str]) -> Source:
    from lavis_mafa.datasets.builders import GritEmojiBuilder

    root = Path(info.root).expanduser()
    return Source((root / GritEmojiBuilder.CAPTIONS[info.get("captions", "fixed")],), root, process)


def _of_lavis(where: str, info: Any, process: Callable[[str], str]) -> Source:
    """LAVIS's caption data sets keep image and caption in JSON lists; their image paths are not confined to the folder."""
    from lavis.common.utils import get_cache_path
    from omegaconf import OmegaConf

    storage = OmegaConf.select(info, "annotations.train.storage")
    root = OmegaConf.select(info, "images.storage")
    if storage is None or root is None:
        raise UserError(f"{where} names no annotations.train.storage and images.storage, which check-data needs.")
    files = [storage] if isinstance(storage, str) else list(storage)
    return Source(tuple(Path(get_cache_path(file)) for file in files), Path(get_cache_path(root)), process, True, one_caption=True)


FINDERS: dict[str, Callable[[str, Any, Callable[[str], str]], Source]] = {"grit_pairs": _pairs, "grit_emoji": _emoji}
