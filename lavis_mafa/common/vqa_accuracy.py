"""Accuracy of answers to questions about images, in per cent. Normalising and VQA accuracy are LAVIS's ``VQAEval``."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lavis.common.vqa_tools.vqa import VQA
from lavis.common.vqa_tools.vqa_eval import VQAEval

from lavis_mafa.common.errors import UserError

PEOPLE = 10


def normalized(answer: str) -> str:
    """The answer in lower case, without punctuation and articles, numbers as digits.

    Example:
        >>> normalized("The two dogs.")
        '2 dogs'
    """
    tools = _tools()
    return tools.processDigitArticle(tools.processPunctuation(" ".join(answer.split())))


def accuracy(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """How many predictions are right, after normalising both sides.

    Where every question has ten answers, they are taken as those of ten people and give VQA accuracy (Antol et al. 2015):
    min(1, matches / 3), averaged over leaving each of the ten out. Otherwise any of a question's answers is right.

    Args:
        predictions: [N].
        answers: [N] lists, none empty.

    Returns:
        The mean, in per cent.

    Example:
        >>> accuracy(["A dog", "cat"], [["dog", "puppy"], ["mouse"]])
        50.0
    """
    right = [[normalized(answer) for answer in of_question] for of_question in answers]
    if all(len(of_question) == PEOPLE for of_question in right):
        truth = VQA()
        truth.qa = {
            number: {
                "question_id": number,
                "question_type": "",
                "answer_type": "",
                "answers": [{"answer_id": n, "answer": answer} for n, answer in enumerate(of_question)],
            }
            for number, of_question in enumerate(right)
        }
        return _evaluated(truth, dict(enumerate(predictions)))["overall"]
    hits = [normalized(prediction) in of_question for prediction, of_question in zip(predictions, right, strict=True)]
    return 100 * sum(hits) / len(hits)


def official_accuracy(predictions: Mapping[int, str], annotation_file: str | Path, question_file: str | Path) -> dict[str, float]:
    """VQA accuracy by the annotations of VQAv2 or OK-VQA, over the questions that have a prediction.

    Returns:
        ``accuracy``, and ``accuracy_<type>`` for each type of answer (VQAv2: ``yes_no``, ``number``, ``other``).

    Raises:
        UserError: a prediction for a question that the annotations do not know.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = VQA(annotation_file, question_file)
    unknown = [question for question in predictions if question not in truth.qa]
    if unknown:
        raise UserError(f"{annotation_file} has no answers to {len(unknown)} of {len(predictions)} questions, the first {unknown[0]}.")
    found = _evaluated(truth, predictions)
    by_type = {f"accuracy_{name.replace('/', '_').replace(' ', '_')}": value for name, value in found["perAnswerType"].items()}
    return {"accuracy": found["overall"], **by_type}


@cache
def _tools() -> Any:
    return VQAEval()


def _evaluated(truth: VQA, predictions: Mapping[int, str]) -> dict[str, Any]:
    # VQA.loadRes would insist on a prediction for every question of the annotations.
    truth.dataset = {"annotations": list(truth.qa.values())}
    results = VQA()
    results.qa = {question: {"answer": answer} for question, answer in predictions.items()}
    evaluation = VQAEval(truth, results, n=6)
    with contextlib.redirect_stdout(io.StringIO()):  # a progress bar
        evaluation.evaluate(list(predictions))
    return evaluation.accuracy
