"""Questions about images with their answers: the evaluation data of visual question answering."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from lavis.datasets.datasets.base_dataset import BaseDataset

from lavis_mafa.datasets.formats import Id, collate_with_ids, typed_ids
from lavis_mafa.datasets.ground_truth import GroundTruth
from lavis_mafa.datasets.images import load_rgb
from lavis_mafa.errors import UserError

NAMING_QUESTION = "what is this?"


class ImageQuestions(BaseDataset):
    """A question a row.

    Args:
        vis_processor: PIL RGB image -> tensor.
        text_processor: question -> question.
        vis_root: folder that relative image paths start from.
        table: columns ``image``, ``question``, ``answer`` (a list of right answers, or what ten people said) and optionally
            ``question_id``, as ``read_annotations`` with ``QUESTIONS`` gives it.
        source: where the table is from, for messages.

    Attributes:
        questions: [N] as they were written. answers: [N] lists.
        question_ids: [N] the column, texts or numbers as they were, or the row's number from 0.

    Raises:
        UserError: some rows have no ``question_id``, or it is there twice.
    """

    def __init__(
        self,
        vis_processor: Callable[[Any], torch.Tensor],
        text_processor: Callable[[str], str],
        vis_root: str | Path,
        table: pa.Table,
        source: str = "questions",
    ) -> None:
        self.vis_root = Path(vis_root)
        self.vis_processor = vis_processor
        self.text_processor = text_processor
        self.image: list[str] = table["image"].to_pylist()
        self.questions: list[str] = table["question"].to_pylist()
        self.answers: list[list[str]] = table["answer"].to_pylist()
        given = typed_ids(table, "question_id") if "question_id" in table.column_names else range(table.num_rows)
        self.question_ids: list[Id] = []
        row_of: dict[Id, int] = {}
        for row, one in enumerate(given, 1):
            if one is None:
                raise UserError(f"{source}, row {row}: no question_id; allowed: one in every row, or no such column.")
            if row_of.setdefault(one, row) != row:
                raise UserError(f"{source}: question_id {one} is there twice, in rows {row_of[one]} and {row}; allowed: once.")
            self.question_ids.append(one)

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample: ``image``, ``text_input`` (the question), ``question_id``, ``index``.

        Raises:
            OSError: the image cannot be read.
        """
        return {
            "image": self.vis_processor(load_rgb(self.vis_root / self.image[index])),
            "text_input": self.text_processor(self.questions[index]),
            "question_id": self.question_ids[index],
            "index": index,
        }

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch: images stacked, questions a list, ``index`` an int64 tensor, and ``question_id`` (see ``collate_with_ids``)."""
        return collate_with_ids(samples, "question_id")


def naming_questions(pairs: pa.Table, truth: GroundTruth) -> pa.Table:
    """``what is this?`` for each row of an image and its ``concept``; right is every name and alias that truly holds for it.

    Args:
        pairs: columns ``image`` and ``concept``.
        truth: with the kinds ``name`` and ``alias``.

    Returns:
        Columns ``image``, ``question``, ``answer``, as ``ImageQuestions`` takes them.
    """
    names = torch.tensor([key for key in range(len(truth.texts)) if truth.text_kind(key) in ("name", "alias")])
    right = truth.matrix(truth.concepts.find_all(pairs["concept"]), names)
    answers = [[truth.text(int(key)) for key in names[row]] for row in right]
    questions = pa.array([NAMING_QUESTION] * pairs.num_rows)
    return pa.table({"image": pairs["image"], "question": questions, "answer": pa.array(answers, pa.list_(pa.string()))})
