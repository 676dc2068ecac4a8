"""LAVIS dataset builders: ``grit_pairs`` (one's own image-text pairs) and ``grit_emoji`` (the embedded default data).

Nothing is ever downloaded, and relative paths start from the working directory, not from LAVIS's cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from omegaconf import DictConfig, ListConfig

from lavis_mafa.common.errors import UserError, did_you_mean
from lavis_mafa.datasets.arrow_compute import pc
from lavis_mafa.datasets.emoji.truth import first_concepts, load_emoji_truth, read_truth
from lavis_mafa.datasets.ground_truth import GroundTruth
from lavis_mafa.datasets.image_text_pairs import ImageTextPairs, Select
from lavis_mafa.datasets.retrieval import RetrievalPairs

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "datasets"
SPLITS = ("train", "val", "test")
Datasets = dict[str, ImageTextPairs | RetrievalPairs]


class _LocalBuilder(BaseDatasetBuilder):
    """What both builders share: training splits are pairs, the others galleries; no downloads."""

    train_dataset_cls = ImageTextPairs
    eval_dataset_cls = RetrievalPairs

    def build_datasets(self) -> Datasets:
        """Split -> data set, for the splits that the configuration names."""
        return self.build()

    def _dataset(
        self, split: str, files: list[Path], root: Path, select: Select, truth: GroundTruth | None = None
    ) -> ImageTextPairs | RetrievalPairs:
        mode = "train" if split == "train" else "eval"
        vis, text = self.vis_processors[mode], self.text_processors[mode]
        for name, processor in (("vis_processor", vis), ("text_processor", text)):
            if processor is None:
                raise UserError(f"{name}.{mode} is missing, but split '{split}' needs it; give it a name, such as albef_image_{mode}.")
        cls = self.train_dataset_cls if split == "train" else self.eval_dataset_cls
        return cls(vis, text, root, files, truth, select)


class GritPairsBuilder(_LocalBuilder):
    """Own image-text pairs, from JSON, JSON lines, CSV, TSV or Parquet (see ``read_annotations``).

    ``build_info.annotations.<train|val|test>.storage`` is a file or a list of files, ``build_info.images.storage`` the folder
    that image paths start from; ``build_info.max_images`` (optional) keeps the first rows only. A split without a file is left
    out.
    """

    DATASET_CONFIG_DICT = {"default": str(CONFIGS / "grit_pairs" / "defaults.yaml")}

    def build(self) -> Datasets:
        """Split -> data set.

        Raises:
            UserError: an unknown key, no annotation file at all, no image folder, or whatever ``read_annotations`` finds.
        """
        where = "datasets.grit_pairs.build_info"
        info = self.config.build_info
        _check_keys(where, info, ("annotations", "images", "max_images"))
        _check_keys(f"{where}.annotations", info.annotations, SPLITS)
        self.build_processors()
        files = {split: _paths(info.annotations.get(split)) for split in SPLITS}
        if not any(files.values()):
            raise UserError(f"{where}.annotations.train.storage is not set; allowed: a path or a list of paths.")
        root = info.images.get("storage")
        if root is None:
            raise UserError(f"{where}.images.storage is not set; allowed: the folder that image paths start from.")
        limit = _count(f"{where}.max_images", info.get("max_images"))
        folder = Path(root).expanduser()
        return {split: self._dataset(split, paths, folder, lambda rows: rows[:limit]) for split, paths in files.items() if paths}


class GritEmojiBuilder(_LocalBuilder):
    """The emoji data that ``lavis-mafa build-emoji`` writes.

    Splits: ``train``; ``val``, other drawings of concepts that are in training; ``test``, drawings of unknown concepts.

    ``build_info.root`` is that folder; ``build_info.captions`` says whether a training image keeps one caption (``fixed``) or
    one of eight is drawn at each access (``drawn``), or that and all drawings of a concept count as one image (``curated``:
    like COCO's several captions an image, for training Con-D). ``build_info.max_concepts`` (optional) keeps the first
    concepts, in every split.
    """

    DATASET_CONFIG_DICT = {"default": str(CONFIGS / "grit_emoji" / "defaults.yaml")}
    CAPTIONS = {"fixed": "train.jsonl", "drawn": "train_captions.jsonl", "curated": "train_captions.jsonl"}

    def build(self) -> Datasets:
        """Split -> data set.

        Raises:
            UserError: an unknown key or value, or the folder holds no emoji data.
        """
        where = "datasets.grit_emoji.build_info"
        info = self.config.build_info
        _check_keys(where, info, ("root", "captions", "max_concepts"))
        captions = str(info.get("captions", "fixed"))
        if captions not in self.CAPTIONS:
            allowed = ", ".join(self.CAPTIONS)
            raise UserError(f"{where}.captions is '{captions}'; allowed: {allowed}.{did_you_mean(captions, self.CAPTIONS)}")
        count = _count(f"{where}.max_concepts", info.get("max_concepts"))
        self.build_processors()
        root = Path(info.root).expanduser()
        truth = load_emoji_truth(root, count)
        concepts = first_concepts(read_truth(root), count)

        def of_these_concepts(rows: pa.Table, one_image: bool) -> pa.Table:
            kept = rows.filter(pc.is_in(rows["concept"], value_set=concepts))
            if kept.num_rows == 0:
                raise UserError(f"{where}.max_concepts is {count}, which leaves a split without images; raise it, or null for all.")
            if one_image:
                kept = kept.set_column(kept.schema.get_field_index("image_id"), "image_id", kept["concept"])
            return kept

        files = {"train": self.CAPTIONS[captions], "val": "seen.jsonl", "test": "unseen.jsonl"}
        one_image = {split: captions == "curated" and split == "train" for split in files}
        return {
            split: self._dataset(split, [root / file], root, partial(of_these_concepts, one_image=one_image[split]), truth)
            for split, file in files.items()
        }


BUILDERS = {"grit_pairs": GritPairsBuilder, "grit_emoji": GritEmojiBuilder}


def _paths(split: Any) -> list[Path]:
    storage = split.get("storage") if split is not None else None
    if storage is None:
        return []
    return [Path(path).expanduser() for path in (storage if isinstance(storage, ListConfig | list) else [storage])]


def _count(key: str, value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or value < 1):
        raise UserError(f"{key} is {value}; allowed: a whole number from 1, or null for all.")
    return value


def _check_keys(where: str, block: DictConfig, allowed: Iterable[str]) -> None:
    allowed = list(allowed)
    for key in map(str, block):
        if key not in allowed:
            raise UserError(f"{where}.{key} is not a key; allowed: {', '.join(allowed)}.{did_you_mean(key, allowed)}")
