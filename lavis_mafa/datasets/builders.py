"""LAVIS dataset builders: of one's own files ``grit_pairs``, ``grit_vqa``, ``grit_entailment``, ``grit_statements`` and
``grit_boxes``; of embedded data ``grit_emoji`` and ``grit_scenes``.

Nothing is ever downloaded, and relative paths start from the working directory, not from LAVIS's cache.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from lavis.common.registry import registry
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from torch.utils.data import Dataset

from lavis_mafa.config.data import (
    SCENE_FILES,
    SPLITS,
    TRAINING_FILES,
    allows_absolute_paths,
    check_info,
    kept,
    missing_files,
    own_files,
)
from lavis_mafa.datasets.boxes import EXPRESSIONS, GroundedImages, read_expressions
from lavis_mafa.datasets.emoji.truth import first_concepts, load_emoji_truth, read_truth
from lavis_mafa.datasets.formats import QUESTIONS, SAME_IMAGE, SENTENCES, STATEMENTS
from lavis_mafa.datasets.ids import pc
from lavis_mafa.datasets.pairs import (
    GLANCE,
    ImageQuestions,
    ImageTextPairs,
    LabelledSentences,
    RetrievalPairs,
    Select,
    Statements,
    naming_questions,
    open_annotations,
)
from lavis_mafa.errors import UserError

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "datasets"
Datasets = dict[str, Dataset]


class _LocalBuilder(BaseDatasetBuilder):
    """What our builders share: no downloads, and the processors of a split. Keys are described in docs/configuration.md.

    ``build`` gives split -> data set, and raises UserError for an unknown key, files or an image folder that are not there, and
    whatever ``read_annotations`` finds.
    """

    def build_datasets(self) -> Datasets:
        return self.build()

    def _processors(self, split: str) -> tuple[Any, Any]:
        mode = "train" if split == "train" else "eval"
        vis, text = self.vis_processors[mode], self.text_processors[mode]
        for name, processor in (("vis_processor", vis), ("text_processor", text)):
            if processor is None:
                raise UserError(f"{name}.{mode} is missing, but split '{split}' needs it; give it a name, such as albef_image_{mode}.")
        return vis, text

    def _pairs(self, split: str, *data: Any, prefix_lm: bool) -> Dataset:
        """Training splits are pairs, the others galleries."""
        if split == "train":
            return ImageTextPairs(*self._processors(split), *data, prefix_lm=prefix_lm)
        return RetrievalPairs(*self._processors(split), *data)


class _OwnFilesBuilder(_LocalBuilder):
    """``build_info.annotations.<split>.storage``, a file, folder, pattern or list of them, with ``build_info.images.storage``."""

    name: str

    def build(self) -> Datasets:
        where, info = f"datasets.{self.name}.build_info", self.config.build_info
        check_info(self.name, info)
        files, root, select = own_files(where, info, SPLITS[self.name])
        anywhere = allows_absolute_paths(where, info)
        self.build_processors()
        return {split: self._split(split, root, paths, select, anywhere) for split, paths in files.items()}

    def _split(self, split: str, root: Path, paths: Any, select: Select, anywhere: bool) -> Dataset:
        raise NotImplementedError


class GritPairsBuilder(_OwnFilesBuilder):
    """Own image-text pairs, from JSON, JSON lines, CSV, TSV or Parquet (see ``read_annotations``)."""

    name = "grit_pairs"
    DATASET_CONFIG_DICT = {"default": str(CONFIGS / "grit_pairs" / "defaults.yaml")}

    def _split(self, split: str, root: Path, paths: Any, select: Select, anywhere: bool) -> Dataset:
        prefix_lm = self.config.build_info.get("prefix_lm", False)
        return self._pairs(split, root, paths, None, select, anywhere, prefix_lm=prefix_lm)


class GritVqaBuilder(_OwnFilesBuilder):
    """Own questions about images, from the same formats; columns ``image``, ``question``, ``answer``, optionally ``question_id``."""

    name = "grit_vqa"
    DATASET_CONFIG_DICT = {"default": str(CONFIGS / "grit_vqa" / "defaults.yaml")}

    def _split(self, split: str, root: Path, paths: Any, select: Select, anywhere: bool) -> Dataset:
        _, table = open_annotations(root, paths, select, QUESTIONS, anywhere, GLANCE if split == "train" else 1)
        return ImageQuestions(*self._processors(split), root, table, ", ".join(map(str, paths)))


class GritEntailmentBuilder(_OwnFilesBuilder):
    """Own sentences about images, from the same formats; columns ``image``, ``sentence`` (or ``caption``), ``label``, optionally
    ``sentence_id``; the scenes' ``entailment_<split>.parquet`` too."""

    name = "grit_entailment"
    DATASET_CONFIG_DICT = {"default": str(CONFIGS / "grit_entailment" / "defaults.yaml")}

    columns, dataset = SENTENCES, LabelledSentences

    def _split(self, split: str, root: Path, paths: Any, select: Select, anywhere: bool) -> Dataset:
        _, table = open_annotations(root, paths, select, self.columns, anywhere, GLANCE if split == "train" else 1)
        sentences = self.dataset(*self._processors(split), root, table, ", ".join(map(str, paths)))
        if split != "train":
            sentences.check_sentences()
        return sentences


class GritStatementsBuilder(GritEntailmentBuilder):
    """Own sentences about two images, from the same formats; columns ``images`` (two paths) or ``image0`` and ``image1``, ``sentence``,
    ``label``, optionally ``sentence_id``; the scenes' ``statements_<split>.parquet`` too."""

    name = "grit_statements"
    DATASET_CONFIG_DICT = {"default": str(CONFIGS / "grit_statements" / "defaults.yaml")}
    columns, dataset = STATEMENTS, Statements


class GritBoxesBuilder(_OwnFilesBuilder):
    """Own expressions about images, and the boxes of what they mean: columns ``image``, ``text``, and where they are evaluated ``box``,
    ``boxes`` and optionally ``expression_id``; the scenes' ``grounding_<split>.parquet`` too. ``train`` is pairs."""

    name = "grit_boxes"
    DATASET_CONFIG_DICT = {"default": str(CONFIGS / "grit_boxes" / "defaults.yaml")}

    def _split(self, split: str, root: Path, paths: Any, select: Select, anywhere: bool) -> Dataset:
        if split != "train":
            return GroundedImages(*self._processors(split), read_expressions(paths, root, anywhere, select))

        def as_pairs(rows: pa.Table) -> pa.Table:
            rows = select(rows)
            return rows.rename_columns(["caption" if name == "text" else name for name in rows.column_names])

        return ImageTextPairs(*self._processors(split), root, paths, None, as_pairs, anywhere, EXPRESSIONS)


class GritEmojiBuilder(_LocalBuilder):
    """The emoji data that ``lavis-mafa build-emoji`` writes.

    Splits: ``train``; ``val``, other drawings of concepts that are in training; ``test``, drawings of unknown concepts. With
    ``view: questions``, ``val`` and ``test`` ask "what is this?" about each drawing, and every name that truly holds is right.
    """

    DATASET_CONFIG_DICT = {"default": str(CONFIGS / "grit_emoji" / "defaults.yaml")}

    def build(self) -> Datasets:
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

        files = {"train": TRAINING_FILES[captions], "val": "seen.jsonl", "test": "unseen.jsonl"}
        datasets: Datasets = {}
        for split, file in files.items():
            select = partial(of_these_concepts, one_image=captions == "curated" and split == "train")
            if view == "questions" and split != "train":
                _, table = open_annotations(root, [root / file], select)
                datasets[split] = ImageQuestions(*self._processors(split), root, naming_questions(table, truth))
            else:
                datasets[split] = self._pairs(split, root, [root / file], truth, select, prefix_lm=prefix_lm)
        return datasets


class GritScenesBuilder(_LocalBuilder):
    """The scenes that ``lavis-mafa build-scenes`` writes.

    Splits: ``train``; ``val``, new scenes; ``test``, new scenes by another artist; ``unseen``, scenes of things that may not be in
    training. With ``view: questions``, all but ``train`` are questions with one right answer each.
    """

    DATASET_CONFIG_DICT = {"default": str(CONFIGS / "grit_scenes" / "defaults.yaml")}

    def build(self) -> Datasets:
        info = self.config.build_info
        check_info("grit_scenes", info)
        if missing := missing_files("grit_scenes", self.config):
            raise UserError(missing[0])
        self.build_processors()
        root, prefix_lm = Path(info.root).expanduser(), info.get("prefix_lm", False)
        datasets: Datasets = {}
        for split in SPLITS["grit_scenes"]:
            if split == "train":
                file, select = root / SCENE_FILES[info.get("captions", "web")], partial(kept, limit=info.get("max_images"), seed=None)
                datasets[split] = self._pairs(split, root, [file], None, select, prefix_lm=prefix_lm)
            elif info.get("view") == "questions":
                file = root / f"questions_{split}.parquet"
                _, table = open_annotations(root, [file], None, QUESTIONS)
                datasets[split] = ImageQuestions(*self._processors(split), root, table, str(file))
            else:
                datasets[split] = self._pairs(split, root, [root / f"{split}.parquet"], prefix_lm=prefix_lm)
        return datasets


BUILDERS = {
    "grit_pairs": GritPairsBuilder,
    "grit_vqa": GritVqaBuilder,
    "grit_entailment": GritEntailmentBuilder,
    "grit_statements": GritStatementsBuilder,
    "grit_boxes": GritBoxesBuilder,
    "grit_emoji": GritEmojiBuilder,
    "grit_scenes": GritScenesBuilder,
}
# here, not in plugin.py: where this module is the first to import LAVIS, that asks for it while it is only half imported
registry.mapping["builder_name_mapping"].update(BUILDERS)
