"""LAVIS dataset builders: ``grit_pairs`` and ``grit_vqa`` (one's own image-text pairs and questions), ``grit_emoji`` (embedded data).

Nothing is ever downloaded, and relative paths start from the working directory, not from LAVIS's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis.datasets.datasets.base_dataset import BaseDataset

from lavis_mafa.config.data import SPLITS, TRAINING_FILES, AnnotationFile, allows_absolute_paths, check_info, own_files
from lavis_mafa.datasets.emoji.truth import first_concepts, load_emoji_truth, read_truth
from lavis_mafa.datasets.formats import QUESTIONS, SAME_IMAGE, pc
from lavis_mafa.datasets.ground_truth import GroundTruth
from lavis_mafa.datasets.pairs import ImageTextPairs, Select, open_annotations
from lavis_mafa.datasets.questions import ImageQuestions, naming_questions
from lavis_mafa.datasets.splits import RetrievalPairs
from lavis_mafa.errors import UserError

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "datasets"
Datasets = dict[str, BaseDataset]


class _LocalBuilder(BaseDatasetBuilder):
    """What our builders share: no downloads, and the processors of a split."""

    def build_datasets(self) -> Datasets:
        """Split -> data set, for the splits that the configuration names."""
        return self.build()

    def _processors(self, split: str) -> tuple[Any, Any]:
        mode = "train" if split == "train" else "eval"
        vis, text = self.vis_processors[mode], self.text_processors[mode]
        for name, processor in (("vis_processor", vis), ("text_processor", text)):
            if processor is None:
                raise UserError(f"{name}.{mode} is missing, but split '{split}' needs it; give it a name, such as albef_image_{mode}.")
        return vis, text

    def _pairs(
        self,
        split: str,
        files: Sequence[str | Path | AnnotationFile],
        root: Path,
        select: Select,
        prefix_lm: bool,
        truth: GroundTruth | None = None,
        allow_absolute_paths: bool = False,
    ) -> BaseDataset:
        """Training splits are pairs, the others galleries."""
        vis, text = self._processors(split)
        if split == "train":
            return ImageTextPairs(vis, text, root, files, truth, select, prefix_lm, allow_absolute_paths)
        return RetrievalPairs(vis, text, root, files, truth, select, allow_absolute_paths)


class GritPairsBuilder(_LocalBuilder):
    """Own image-text pairs, from JSON, JSON lines, CSV, TSV or Parquet (see ``read_annotations``).

    ``build_info.annotations.<train|val|test>.storage`` is a file, a folder, a pattern or a list of them (a file with images of its
    own: ``{annotations: FILE, images: FOLDER}``), ``build_info.images.storage`` the folder that image paths start from and stay
    below, unless ``build_info.images.allow_absolute_paths``; ``build_info.max_images`` (optional) keeps the first rows only, or
    with ``build_info.max_images_seed`` random ones. A split without a file is left out. ``build_info.prefix_lm`` splits training
    captions for prefix language modelling (see ``ImageTextPairs``).
    """

    DATASET_CONFIG_DICT = {"default": str(CONFIGS / "grit_pairs" / "defaults.yaml")}

    def build(self) -> Datasets:
        """Split -> data set.

        Raises:
            UserError: an unknown key, no annotation file at all, no image folder, or whatever ``read_annotations`` finds.
        """
        where = "datasets.grit_pairs.build_info"
        info = self.config.build_info
        check_info("grit_pairs", info)
        files, root, select = own_files(where, info, SPLITS["grit_pairs"])
        prefix_lm = info.get("prefix_lm", False)
        anywhere = allows_absolute_paths(where, info)
        self.build_processors()
        return {split: self._pairs(split, paths, root, select, prefix_lm, None, anywhere) for split, paths in files.items()}


class GritVqaBuilder(_LocalBuilder):
    """Own questions about images, from the same formats; columns ``image``, ``question``, ``answer``, optionally ``question_id``.

    ``build_info.annotations.<val|test>.storage``, ``build_info.images``, ``build_info.max_images`` and ``max_images_seed`` are as in
    ``grit_pairs``.
    """

    DATASET_CONFIG_DICT = {"default": str(CONFIGS / "grit_vqa" / "defaults.yaml")}

    def build(self) -> Datasets:
        """Split -> ``ImageQuestions``.

        Raises:
            UserError: an unknown key, no annotation file at all, no image folder, or whatever ``read_annotations`` finds.
        """
        where = "datasets.grit_vqa.build_info"
        info = self.config.build_info
        check_info("grit_vqa", info)
        files, root, select = own_files(where, info, SPLITS["grit_vqa"])
        anywhere = allows_absolute_paths(where, info)
        self.build_processors()
        datasets: Datasets = {}
        for split, paths in files.items():
            _, table = open_annotations(root, paths, select, QUESTIONS, anywhere)
            datasets[split] = ImageQuestions(*self._processors(split), root, table, ", ".join(map(str, paths)))
        return datasets


class GritEmojiBuilder(_LocalBuilder):
    """The emoji data that ``lavis-mafa build-emoji`` writes.

    Splits: ``train``; ``val``, other drawings of concepts that are in training; ``test``, drawings of unknown concepts.

    ``build_info.root`` is that folder; ``build_info.captions`` says whether a training image keeps one caption (``fixed``) or
    one of eight is drawn at each access (``drawn``), or that and all drawings of a concept count as one image (``curated``:
    like COCO's several captions an image, for training Con-D). ``build_info.max_concepts`` (optional) keeps the first
    concepts, in every split.

    ``build_info.view``: with ``questions``, ``val`` and ``test`` ask "what is this?" about each drawing, and every name that truly
    holds is a right answer; with ``pairs`` they are galleries for retrieval. ``build_info.prefix_lm`` is as in ``grit_pairs``.
    """

    DATASET_CONFIG_DICT = {"default": str(CONFIGS / "grit_emoji" / "defaults.yaml")}
    CAPTIONS = TRAINING_FILES

    def build(self) -> Datasets:
        """Split -> data set.

        Raises:
            UserError: an unknown key or value, or the folder holds no emoji data.
        """
        where = "datasets.grit_emoji.build_info"
        info = self.config.build_info
        check_info("grit_emoji", info)
        captions, view, prefix_lm = info.get("captions", "fixed"), info.get("view", "pairs"), info.get("prefix_lm", False)
        first = info.get("max_concepts")
        self.build_processors()
        root = Path(info.root).expanduser()
        truth = load_emoji_truth(root, first)
        concepts = first_concepts(read_truth(root), first)

        def of_these_concepts(rows: pa.Table, one_image: bool) -> pa.Table:
            kept = rows.filter(pc.is_in(rows["concept"], value_set=concepts))
            if kept.num_rows == 0:
                raise UserError(f"{where}.max_concepts is {first}, which leaves a split without images; raise it, or null for all.")
            if one_image:
                kept = kept.append_column(SAME_IMAGE, kept["concept"])
            return kept

        files = {"train": self.CAPTIONS[captions], "val": "seen.jsonl", "test": "unseen.jsonl"}
        datasets: Datasets = {}
        for split, file in files.items():
            select = partial(of_these_concepts, one_image=captions == "curated" and split == "train")
            if view == "questions" and split != "train":
                _, table = open_annotations(root, [root / file], select)
                datasets[split] = ImageQuestions(*self._processors(split), root, naming_questions(table, truth))
            else:
                datasets[split] = self._pairs(split, [root / file], root, select, prefix_lm, truth)
        return datasets


BUILDERS = {"grit_pairs": GritPairsBuilder, "grit_vqa": GritVqaBuilder, "grit_emoji": GritEmojiBuilder}
