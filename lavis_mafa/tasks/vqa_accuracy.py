"""Accuracy of answers to questions about images, in per cent; normalising is that of LAVIS's ``VQAEval``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lavis.common.vqa_tools.vqa_eval import VQAEval

from lavis_mafa.datasets.ids import id_of_json
from lavis_mafa.errors import UserError

MODEL = "en_core_web_sm"
PEOPLE = 10
FEWEST = 4  # people, of whom the official script can find three others that agree
Id = int | str


def load_lemmatizer(key: str) -> Callable[[str], str]:
    """A function that puts an answer's nouns and verbs into their base form: ``dogs playing`` -> ``dog play``.

    UserError, naming the setting ``key``, if spaCy's English model is not installed.
    """
    import spacy

    if not spacy.util.is_package(MODEL):
        raise UserError(f"{key} is true, but spaCy's {MODEL} is not installed; install it with: python -m spacy download {MODEL}")
    model = spacy.load(MODEL)

    def lemmatized(answer: str) -> str:
        return " ".join(word.lemma_ if word.pos_ in ("NOUN", "VERB") else word.text for word in model(answer))

    return lemmatized


@dataclass(frozen=True)
class Question:
    """What people answered to a question, and VQAv2's kind of answer (``yes/no``, ``number``, ``other``) where it is known."""

    answers: list[str]
    kind: str | None


def normalized(answer: str) -> str:
    """The answer in lower case, without punctuation and articles, numbers as digits. An article alone stays as it is.

    Example:
        >>> normalized("The two dogs.")
        '2 dogs'
    """
    return _without_articles(answer) or " ".join(_without_punctuation(answer).lower().split())


def accuracy(predictions: Sequence[str], answers: Sequence[Sequence[str]], leave_one_out: bool = True) -> float:
    """How many predictions are right, after normalising both sides. An empty prediction never is.

    A question's ten answers are taken as those of ten people and give VQA accuracy (Antol et al. 2015): min(1, matches / 3),
    averaged over leaving each of the ten out. Of another number of answers any is right. Each question is judged by itself.

    Args:
        predictions: [N]. answers: [N] lists, none empty.
        leave_one_out: False takes ten people's answers at once, as A-OKVQA does.

    Example:
        >>> accuracy(["A dog", "cat"], [["dog", "puppy"], ["mouse"]])
        50.0
    """
    scores = []
    for prediction, of_question in zip(predictions, answers, strict=True):
        said, right = normalized(prediction), [normalized(answer) for answer in of_question]
        scores.append(_agreement(said, right, leave_one_out) if len(right) == PEOPLE else float(bool(said) and said in right))
    return 100 * sum(scores) / len(scores)


def official_accuracy(predictions: Mapping[Id, str], people: Mapping[Id, Question]) -> dict[str, float]:
    """VQA accuracy as the official script has it (``VQAEval``), over the questions that have a prediction.

    Unlike :func:`accuracy` it takes articles and numbers in the people's answers as they are, and an answer that is nothing but
    an article is wrong. Of fewer than four answers, with which the script gives nobody full marks (of one: none), any is right.

    Args:
        predictions: question id -> answer.

    Returns:
        ``accuracy``, and ``accuracy_<kind>`` for each kind of answer (VQAv2: ``yes_no``, ``number``, ``other``).

    Raises:
        UserError: a prediction for a question that the annotations do not know.
    """
    check_known(predictions, people)
    scores: list[float] = []
    by_kind: dict[str, list[float]] = {}
    for question, prediction in predictions.items():
        found = people[question]
        alike = len(set(found.answers)) == 1  # then they are not normalised, in the official script
        right = found.answers if alike else [_tools().processPunctuation(answer) for answer in found.answers]
        said = _without_articles(prediction)
        scores.append(_agreement(said, right) if len(right) >= FEWEST else float(bool(said) and said in right))
        if found.kind is not None:
            by_kind.setdefault(found.kind.replace("/", "_").replace(" ", "_"), []).append(scores[-1])
    means = {f"accuracy_{kind}": 100 * sum(of_kind) / len(of_kind) for kind, of_kind in by_kind.items()}
    return {"accuracy": 100 * sum(scores) / len(scores), **means}


def read_people(path: str | Path) -> dict[Id, Question]:
    """Annotations of VQAv2, OK-VQA or VizWiz's kind: ``annotations``, each with ``question_id`` and ``answers``.

    An answer is a text or has one as ``answer``; its ``answer_id``, and the annotation's ``question_type`` and ``answer_type``, may
    be absent.

    Raises:
        UserError: the file is not of that form, or has a question twice with other answers.
    """
    form = "allowed: {annotations: [{question_id: 1, answers: [{answer: dog}, ...]}, ...]}"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    rows = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise UserError(f"{path} has no list 'annotations'; {form}.")
    people: dict[Id, Question] = {}
    for number, row in enumerate(rows):
        row = row if isinstance(row, dict) else {}
        given = row.get("answers")
        answers: list[Any] = [one.get("answer") if isinstance(one, dict) else one for one in given] if isinstance(given, list) else []
        if not isinstance(row.get("question_id"), int | float | str) or not answers or not all(isinstance(one, str) for one in answers):
            raise UserError(f"{path}, annotations[{number}] has no question_id with a list of answers; {form}.")
        text, is_number = id_of_json(f"{path}, annotations[{number}].question_id", row["question_id"])
        if text is None:
            raise UserError(f"{path}, annotations[{number}].question_id is NaN; {form}.")
        name, kind = int(text) if is_number else text, row.get("answer_type")
        question = Question(answers, kind if isinstance(kind, str) and kind else None)
        if people.setdefault(name, question) != question:
            raise UserError(f"{path}, annotations[{number}] has other answers to question {name!r} than a row before it.")
    return people


def check_known(questions: Sequence[Id] | Mapping[Id, Any], people: Mapping[Id, Question], where: str = "The annotations") -> None:
    """Every question has annotations; raises UserError."""
    unknown = [question for question in questions if question not in people]
    if unknown:
        raise UserError(f"{where} have no answers to {len(unknown)} of {len(questions)} questions, the first {unknown[0]!r}.")


def _agreement(said: str, people: Sequence[str], leave_one_out: bool = True) -> float:
    """min(1, matches / 3), by default averaged over leaving each person out."""
    matches = sum(said == answer for answer in people) if said else 0
    if not leave_one_out:
        return min(1.0, matches / 3)
    return sum(min(1.0, (matches - (said == answer)) / 3) for answer in people) / len(people) if matches else 0.0


_tools = cache(VQAEval)


def _without_punctuation(answer: str) -> str:
    return _tools().processPunctuation(" ".join(answer.split()))


def _without_articles(answer: str) -> str:
    return _tools().processDigitArticle(_without_punctuation(answer))
