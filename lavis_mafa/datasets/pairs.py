"""Image-text pairs for pre-training, from one's own annotation files."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from lavis.datasets.datasets.base_dataset import BaseDataset
from torch.utils.data import default_collate

from lavis_mafa.config.data import AnnotationFile
from lavis_mafa.datasets.annotations import clean_caption, image_keys, path_hint, read_annotations, shown
from lavis_mafa.datasets.formats import PAIRS, Columns
from lavis_mafa.datasets.ground_truth import GroundTruth
from lavis_mafa.datasets.images import load_rgb
from lavis_mafa.errors import UserError

Select = Callable[[pa.Table], pa.Table]
GLANCE = 10  # rows: one missing image is a bad sample, so many from the beginning are a wrong folder


def open_annotations(
    vis_root: str | Path,
    ann_paths: Sequence[str | Path | AnnotationFile],
    select: Select | None,
    columns: Columns = PAIRS,
    allow_absolute_paths: bool = False,
    glance: int = 1,
) -> tuple[Path, pa.Table]:
    """The image folder and the annotations, checked as far as a glance can: one of the first ``glance`` rows' images must be there."""
    root = Path(vis_root)
    if not root.is_dir():
        raise UserError(
            f"The image folder {root} does not exist; set build_info.images.storage to the folder the image paths start from."
        )
    table = read_annotations(ann_paths, columns, allow_absolute_paths)
    if select is not None:
        table = select(table)
    images = [root / image for image in table["image"][:glance].to_pylist()]
    if not any(map(os.path.isfile, images)):
        why = path_hint(root, table["image"][0].as_py()) or f"is {root} the folder the paths start from?"
        raise UserError(f"{ann_paths[0]}, row 1: no image at {shown(images[0])}; {why}")
    return root, table


class ImageTextPairs(BaseDataset):
    """Rows of image and caption(s). Of several captions one is drawn at each access, by Python's ``random``.

    Nothing is seeded here: whoever iterates owns the random state. A row with one caption draws nothing.

    Args:
        vis_processor: PIL RGB image -> tensor.
        text_processor: str -> str.
        vis_root: folder that relative image paths start from.
        ann_paths: annotation files, see ``read_annotations``.
        truth: which image matches which text; None takes what a ``concept`` column of the annotations tells.
        select: the table -> the rows to use (at least one).
        prefix_lm: split each caption at a random word, for prefix language modelling (BLIP-2 with an encoder-decoder).
        allow_absolute_paths: image paths may leave ``vis_root``.

    Attributes:
        table: the annotations. image_keys: [N], one number per image.
        truth, concepts: the truth and [N] concept numbers by it; None where nothing is known.

    Raises:
        UserError: from the annotations, or the image folder or all of the first ``GLANCE`` rows' images do not exist.
    """

    def __init__(
        self,
        vis_processor: Callable[[Any], torch.Tensor],
        text_processor: Callable[[str], str],
        vis_root: str | Path,
        ann_paths: Sequence[str | Path | AnnotationFile],
        truth: GroundTruth | None = None,
        select: Select | None = None,
        prefix_lm: bool = False,
        allow_absolute_paths: bool = False,
    ) -> None:
        # Not BaseDataset's own: it reads JSON lists into dicts and adds a string to every one.
        self.vis_root, self.table = open_annotations(
            vis_root, ann_paths, select, allow_absolute_paths=allow_absolute_paths, glance=GLANCE
        )
        self.vis_processor = vis_processor
        self.text_processor = text_processor
        self.prefix_lm = prefix_lm
        self.image_keys = image_keys(self.table)
        self.truth = truth or GroundTruth.from_table(self.table)
        self.concepts: torch.LongTensor | None = None
        if self.truth is not None and "concept" in self.table.column_names:
            self.concepts = self.truth.concepts.find_all(self.table["concept"])

    def __len__(self) -> int:
        return self.table.num_rows

    def image_path(self, index: int) -> Path:
        """Where row ``index``'s image is."""
        return self.vis_root / self.table["image"][index].as_py()

    def captions(self, index: int) -> list[str]:
        """Row ``index``'s captions as they were written."""
        return self.table["caption"][index].as_py()

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample: ``image``, ``text_input``, ``index``, ``image_key`` and, with a truth, ``concept`` and ``text_key``.

        With ``prefix_lm`` the caption's beginning is ``text_input`` and its rest ``text_output``.

        Raises:
            OSError: the image cannot be read. The runner takes another sample in its place and counts it.
            EmptyCaption: processing leaves nothing of the caption; likewise.
        """
        captions = self.captions(index)
        caption = captions[0] if len(captions) == 1 else random.choice(captions)
        sample: dict[str, Any] = {
            "image": self.vis_processor(load_rgb(self.image_path(index))),
            "text_input": clean_caption(self.text_processor, caption),
            "index": index,
            "image_key": int(self.image_keys[index]),
        }
        if self.truth is not None and self.concepts is not None:
            sample["concept"] = int(self.concepts[index])
            # Of the caption as written: processing may cut it or make two texts one.
            sample["text_key"] = self.truth.text_key(caption)
        if self.prefix_lm:
            sample["text_input"], sample["text_output"] = split_at_random(sample["text_input"])
        return sample

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch: images stacked, texts a list, numbers int64 tensors."""
        return default_collate(samples)


def split_at_random(caption: str) -> tuple[str, str]:
    """The words before a random place in the caption, and those after it: at least one each, drawn by Python's ``random``.

    A single word is all rest.

    Example:
        >>> split_at_random("a dog")
        ('a', 'dog')
    """
    words = caption.split()
    cut = random.randrange(1, len(words)) if len(words) > 1 else 0
    return " ".join(words[:cut]), " ".join(words[cut:])
