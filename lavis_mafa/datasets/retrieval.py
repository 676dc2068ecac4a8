"""The evaluation view of image-text annotations: every distinct image against every distinct text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lavis.datasets.datasets.base_dataset import BaseDataset

from lavis_mafa.common.errors import EmptyCaption, UserError
from lavis_mafa.datasets.annotation_files import AnnotationFile
from lavis_mafa.datasets.annotations import image_keys
from lavis_mafa.datasets.captions import clean_caption
from lavis_mafa.datasets.ground_truth import GroundTruth
from lavis_mafa.datasets.ids import Id, collate_with_ids, typed_ids
from lavis_mafa.datasets.image_text_pairs import Select, open_annotations
from lavis_mafa.datasets.images import load_rgb


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
