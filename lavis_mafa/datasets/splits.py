"""The evaluation view of image-text annotations: every distinct image against every distinct text.

``run.train_splits``: what is trained on, of one split or several.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from lavis.datasets.datasets.base_dataset import BaseDataset, ConcatDataset
from torch import Tensor
from torch.utils.data import IterableDataset

from lavis_mafa.config.data import AnnotationFile
from lavis_mafa.datasets.annotations import clean_caption, image_keys
from lavis_mafa.datasets.formats import Id, collate_with_ids, pc, typed_ids
from lavis_mafa.datasets.ground_truth import GroundTruth
from lavis_mafa.datasets.images import load_rgb
from lavis_mafa.datasets.pairs import ImageTextPairs, Select, open_annotations
from lavis_mafa.errors import EmptyCaption, UserError


class RetrievalPairs(BaseDataset):
    """A gallery of images and texts, with the attributes LAVIS's retrieval evaluation reads.

    Args: as ``ImageTextPairs``.

    Attributes:
        image: [N] paths of the distinct images. text: [T] distinct captions, processed; raw_text: as they were written.
        img2txt: image -> its own texts; txt2img: text -> the images it is written for.
        relevant: Bool [N, T], which text is right for which image. The own pairs, and with a truth all that it knows to match.
        image_ids: [N] the annotations' own where all of them are whole numbers (``007`` stays that text), else 0 to N-1.
        concepts: [N] or None. text_keys: [T] or None.

    Raises:
        UserError: from the annotations, the image folder or the first image does not exist, or a caption holds no word.
    """

    def __init__(
        self,
        vis_processor: Callable[[Any], torch.Tensor],
        text_processor: Callable[[str], str],
        vis_root: str | Path,
        ann_paths: Sequence[str | Path | AnnotationFile],
        truth: GroundTruth | None = None,
        select: Select | None = None,
        allow_absolute_paths: bool = False,
    ) -> None:
        self.vis_root, self.table = open_annotations(vis_root, ann_paths, select, allow_absolute_paths=allow_absolute_paths)
        self.vis_processor = vis_processor
        self.text_processor = text_processor
        self.truth = truth or GroundTruth.from_table(self.table)
        paths = self.table["image"].to_pylist()
        keys = image_keys(self.table).tolist()

        self.image: list[str] = []
        self.raw_text: list[str] = []
        self.img2txt: dict[int, list[int]] = {}
        self.txt2img: dict[int, list[int]] = {}
        first_rows: list[int] = []
        number: dict[str, int] = {}
        for row, (image, captions) in enumerate(zip(keys, self.table["caption"].to_pylist(), strict=True)):
            # Keys count images in the order of their first rows, so the key is the place in the gallery.
            if image == len(self.image):
                self.image.append(str(self.vis_root / paths[row]))
                self.img2txt[image] = []
                first_rows.append(row)
            for caption in captions:
                text = number.setdefault(caption, len(number))
                if text == len(self.raw_text):
                    self.raw_text.append(caption)
                    self.txt2img[text] = []
                if text not in self.img2txt[image]:
                    self.img2txt[image].append(text)
                    self.txt2img[text].append(image)
        try:
            self.text: list[str] = [clean_caption(text_processor, caption) for caption in self.raw_text]
        except EmptyCaption as error:
            files = ", ".join(map(str, ann_paths))
            raise UserError(f"{files}: {error} Evaluation replaces nothing; `lavis-mafa check-data --clean` leaves it out.") from error

        self.concepts: torch.Tensor | None = None
        self.text_keys: torch.Tensor | None = None
        self.relevant = torch.zeros(len(self.image), len(self.text), dtype=torch.bool)
        if self.truth is not None and "concept" in self.table.column_names:
            self.concepts = self.truth.concepts.find_all(self.table["concept"])[first_rows]
            self.text_keys = torch.tensor([self.truth.text_key(caption) for caption in self.raw_text])
            self.relevant |= self.truth.matrix(self.concepts, self.text_keys)
        for image, texts in self.img2txt.items():
            self.relevant[image, texts] = True

        # what captioning names its captions by: the annotations' own ids where they are numbers, as COCO's are
        ids = typed_ids(self.table.take(first_rows), "image_id") if "image_id" in self.table.column_names else []
        given = [one for one in ids if one is not None and str(one).isdecimal()]
        self.image_ids: list[Id] = given if len(set(given)) == len(self.image) else list(range(len(self.image)))

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.vis_processor(load_rgb(self.image[index])), "index": index, "image_id": self.image_ids[index]}

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch: images stacked, ``index`` an int64 tensor, and ``image_id`` (see ``collate_with_ids``)."""
        return collate_with_ids(samples, "image_id")


Splits = dict[str, Any]


def with_training_splits(datasets: dict[str, Splits], wanted: Sequence[str]) -> dict[str, Splits]:
    """The data sets with what they have of the wanted splits, joined, as their ``train``; the other splits stay.

    Args:
        datasets: by name and split.
        wanted: ``run.train_splits``; empty where nothing is trained.

    Raises:
        UserError: no data set has such a split, or one has nothing there to train on.
    """
    wanted = list(dict.fromkeys(wanted))
    there = sorted({split for parts in datasets.values() for split in parts})
    for split in wanted:
        if split not in there:
            raise UserError(f"run.train_splits names {split!r}, but the data sets have: {', '.join(there)}.")
    if wanted in ([], ["train"]):
        return datasets
    joined: dict[str, Splits] = {}
    for name, parts in datasets.items():
        chosen = {split: parts[split] for split in wanted if split in parts}
        joined[name] = {split: part for split, part in parts.items() if split != "train"}
        if chosen:
            joined[name]["train"] = chosen["train"] if [*chosen] == ["train"] else _joined(name, chosen, parts.get("train"))
    return joined


def _joined(name: str, chosen: Splits, train: Any) -> Any:
    if all(isinstance(part, ImageTextPairs | RetrievalPairs) for part in chosen.values()):
        if not isinstance(train, ImageTextPairs):
            split = next(iter(chosen))
            raise UserError(
                f"run.train_splits is {[*chosen]}, but datasets.{name} has no training split that says how samples are made; name "
                f"the file of {split!r} as build_info.annotations.train.storage instead."
            )
        return one_training_set(train, [*chosen.values()])
    parts = []
    for split, part in chosen.items():
        if isinstance(part, IterableDataset):
            raise UserError(f"run.train_splits is {[*chosen]}, but datasets.{name}'s {split!r} is a stream; allowed: [train].")
        if train is not None and part is not train and hasattr(train, "vis_processor"):
            part = copy.copy(part)
            part.vis_processor, part.text_processor = train.vis_processor, train.text_processor
        if lacking := _lacking(part, train):
            raise UserError(
                f"run.train_splits names {split!r}, but datasets.{name} gives no {lacking!r} there ({type(part).__name__}), which "
                "training needs; allowed: [train]."
            )
        parts.append(part)
    return ConcatDataset(parts)


def _lacking(part: Any, train: Any) -> str | None:
    """What a training sample has and these lack."""
    try:
        own, needed = part[0], {"text_input": ""} if train is None else train[0]
    except OSError:  # an image that cannot be read is a bad sample, met later
        return None
    return next((key for key in needed if key not in own and key not in ("instance_id", "image_id")), None)


def one_training_set(like: ImageTextPairs, parts: Sequence[ImageTextPairs | RetrievalPairs]) -> ImageTextPairs:
    """All rows of the parts as training pairs, in their order; ``like`` has the processors and everything else.

    Rows that show the same file share their image key across the parts too.
    """
    pairs = copy.copy(like)
    pairs.table = pa.concat_tables([part.table for part in parts], promote_options="default")
    pairs.image_keys = shared_keys([part.table for part in parts])  # type: ignore[assignment]
    if any(part.truth is not like.truth for part in parts):  # each knows what its own rows say
        pairs.truth = GroundTruth.from_table(pairs.table)
    pairs.concepts = None
    if pairs.truth is not None and "concept" in pairs.table.column_names:
        pairs.concepts = pairs.truth.concepts.find_all(pairs.table["concept"])
    return pairs


def shared_keys(tables: Sequence[pa.Table]) -> Tensor:
    """LongTensor[N] over all tables: their own image keys, which mean something within their table alone, except that images
    of one path are one.

    Example:
        >>> shared_keys([pa.table({"image": ["a", "b"]}), pa.table({"image": ["c", "b"]})])
        tensor([0, 1, 2, 1])
    """
    paths = pa.chunked_array([chunk for table in tables for chunk in table["image"].chunks], pa.string())
    numbers = pc.index_in(paths, value_set=pc.unique(paths)).to_numpy()
    key_of_path = np.full(int(numbers.max()) + 1, -1)
    found: list[Tensor] = []
    first = row = 0
    for table in tables:
        own, path = image_keys(table).numpy(), numbers[row : row + table.num_rows]
        keys, seen = np.arange(first, first + int(own.max()) + 1), key_of_path[path]
        np.minimum.at(keys, own[seen >= 0], seen[seen >= 0])  # keys of earlier tables are smaller than all of this one's
        key_of_path[path] = np.where(seen >= 0, seen, keys[own])
        found.append(torch.from_numpy(keys[own]))
        first, row = first + len(keys), row + table.num_rows
    return torch.cat(found)
