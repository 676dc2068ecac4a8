"""Which answers are ranked: a file's, the data set's own, or those of its training split."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lavis_mafa.datasets.pairs import ImageQuestions
from lavis_mafa.errors import UserError
from lavis_mafa.tasks.vqa_accuracy import normalized

logger = logging.getLogger(__name__)
FORM = "allowed: a JSON list of texts (.json), or one text a line, each once"


def read_answers(path: str | Path, key: str = "run.answer_list") -> list[str]:
    """Answers of a file, in its order.

    Raises:
        UserError: it cannot be read, or is empty, or holds something that is no text, or one twice.
    """
    where = f"{key}: {path}"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        content = json.loads(text) if Path(path).suffix.lower() == ".json" else text.splitlines()
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid ({error}); {FORM}.") from error
    if not isinstance(content, list) or not content:
        raise UserError(f"{where} holds {'no answer' if content in ([], {}) else type(content).__name__}; {FORM}.")
    first: dict[str, int] = {}
    for number, answer in enumerate(content, 1):
        if not isinstance(answer, str) or not answer.strip():
            raise UserError(f"{where}, answer {number} is {answer!r:.60}; {FORM}.")
        if first.setdefault(answer, number) != number:
            raise UserError(f"{where}, answer {number} is {answer!r:.60}, as answer {first[answer]} is; {FORM}.")
    return content


def own_answers(dataset: Any, trained: Sequence[Any]) -> list[str] | None:
    """``answer_list`` of one of LAVIS's data sets, or all answers of the splits that a data set of ours is trained on."""
    if listed := getattr(dataset, "answer_list", None):
        return list(dict.fromkeys(map(str, listed)))
    parts = [part for joined in trained for part in getattr(joined, "datasets", [joined])]
    if not parts or not all(isinstance(part, ImageQuestions) for part in parts):
        return None
    return list(dict.fromkeys(answer for part in parts for answer in part.distinct_answers()))


def check_answers(answers: Sequence[str], truths: Iterable[Sequence[str]], where: str, candidates: int | None) -> None:
    """Nothing, if these can be ranked and some are right; one line of the log says of how many questions none is.

    Args:
        truths: the right answers to each question, as far as they are known.

    Raises:
        UserError: more candidates than answers, or not one question has a right answer among them.
    """
    if candidates is not None and candidates > len(answers):
        raise UserError(f"run.num_ans_candidates is {candidates}, but {where} ranks {len(answers)} answers; allowed: at most that.")
    plain = cache(normalized)  # many people say the same
    known = {plain(answer) for answer in answers}
    right = [any(plain(answer) in known for answer in truth) for truth in truths if truth]
    lost = right.count(False)
    if right and lost == len(right):
        raise UserError(
            f"{where}: not one of {lost} questions has a right answer among the {len(answers)} that are ranked, such as "
            f"{answers[0]!r:.60}; give the list of these questions as run.answer_list."
        )
    logger.info("%s: %d answers are ranked; %d of %d questions have no right one among them", where, len(answers), lost, len(right))
