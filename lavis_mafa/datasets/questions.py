"""Questions about images with their answers: the evaluation data of visual question answering."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from lavis.datasets.datasets.base_dataset import BaseDataset
from torch.utils.data import default_collate

from lavis_mafa.common.errors import UserError
from lavis_mafa.datasets.ground_truth import GroundTruth
from lavis_mafa.datasets.images import load_rgb

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
        question_ids: [N] the column, or the row's number from 0.

    Raises:
        UserError: a ``question_id`` is not a whole number, or there twice.
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
        given = table["question_id"].to_pylist() if "question_id" in table.column_names else range(table.num_rows)
        self.question_ids = [_whole_number(f"{source}, row {row}", text) for row, text in enumerate(given, 1)]
        row_of: dict[int, int] = {}
        for row, number in enumerate(self.question_ids, 1):
            if row_of.setdefault(number, row) != row:
                raise UserError(f"{source}: question_id {number} is there twice, in rows {row_of[number]} and {row}; allowed: once.")

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
        """A batch: images stacked, questions a list, numbers int64 tensors."""
        return default_collate(samples)


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


def _whole_number(where: str, text: str | int | None) -> int:
    try:
        return int(text)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: question_id is {text!r}; allowed: a whole number in every row, or no such column.") from error
