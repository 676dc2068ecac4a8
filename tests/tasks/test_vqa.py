from __future__ import annotations

import json
import logging
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lavis.common.registry import registry
from torch.utils.data import DataLoader

from lavis_mafa.common.errors import UserError
from lavis_mafa.common.vqa_accuracy import accuracy, normalized, official_accuracy
from lavis_mafa.tasks.mafa_vqa import MafaGqaTask, MafaVqaTask

ANSWERS = [["dog", "puppy"], ["2"], ["yes"]]
SAID = ["A dog.", "two", "no"]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(registry.mapping["paths"], "result_dir", str(tmp_path / "result"))
    return tmp_path / "result"


def run_block(**changes: Any) -> SimpleNamespace:
    settings = {"num_beams": 5, "max_len": 10, "min_len": 1, "length_penalty": -1.0, "prompt": "Question: {} Answer:"}
    return SimpleNamespace(**{**settings, "lemmatize": False, **changes})


class Questions(torch.utils.data.Dataset):
    """As a test split looks: nobody knows the answers."""

    extra: dict[str, Any] = {}

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Any]:
        asked = {"image": torch.tensor([float(index)]), "text_input": f"question {index}?", "question_id": 100 + index}
        return {**asked, **{name: values[index] for name, values in self.extra.items()}}


class OwnQuestions(Questions):
    answers = ANSWERS
    extra = {"index": [0, 1, 2]}


class OfGqa(Questions):
    extra = {"answer": ["dog", "2", "yes"]}


class Model:
    """Gives prepared answers, and spoils the batch as LAVIS's models do."""

    def predict_answers(self, samples: dict[str, Any], **asked: Any) -> list[str]:
        self.asked = asked
        samples["text_input"] = ["spoilt" for _ in samples["text_input"]]
        return [f" {SAID[int(n)]} " for n in samples["image"]]


def evaluate(dataset: Any, cls: Any = MafaVqaTask, model: Any = None) -> Any:
    task = cls(run_block())
    result = task.evaluation(model or Model(), DataLoader(dataset, batch_size=2), cuda_enabled=False)
    return task.after_evaluation(val_result=result, split_name="val", epoch=0)


def test_own_questions(results: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = Model()
    metrics = evaluate(OwnQuestions(), model=model)
    assert metrics == {"accuracy": pytest.approx(200 / 3), "agg_metrics": pytest.approx(200 / 3)}
    written = json.loads((results / "val_vqa_result.json").read_text())
    assert written == [{"question_id": 100 + n, "answer": answer} for n, answer in enumerate(SAID)]
    assert "question 0? -> A dog. (right: dog, puppy)" in caplog.text
    run = vars(run_block())
    passed = {name: run[name] for name in ("num_beams", "max_len", "min_len", "length_penalty", "prompt")}
    assert model.asked == {**passed, "inference_method": "generate"}


def test_gqa_is_exact_match_after_normalising(results: Path) -> None:
    assert evaluate(OfGqa(), MafaGqaTask)["accuracy"] == pytest.approx(200 / 3)


def test_without_answers_there_is_the_file_alone(results: Path) -> None:
    assert evaluate(Questions()) is None
    assert (results / "val_vqa_result.json").is_file()


@pytest.fixture
def of_vqa(tmp_path: Path) -> Questions:
    """VQAv2's files, with ten people's answers to each question, for one question more than is asked."""
    people = [["dog"] * 2 + ["cat"] * 8, ["2"] * 10, ["yes"] * 5 + ["no"] * 5, ["x"] * 10]
    kinds = ["other", "number", "yes/no", "other"]
    annotations = [
        {
            "question_id": 100 + n,
            "image_id": n,
            "question_type": "what",
            "answer_type": kind,
            "answers": [{"answer_id": i, "answer": answer} for i, answer in enumerate(answers)],
        }
        for n, (kind, answers) in enumerate(zip(kinds, people, strict=True))
    ]
    questions = {"questions": [{"question_id": 100 + n, "image_id": n, "question": "?"} for n in range(4)]}
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    data = Questions()
    data.coco_fmt_anno_file = str(tmp_path / "annotations.json")  # type: ignore[attr-defined]
    data.coco_fmt_qust_file = str(tmp_path / "questions.json")  # type: ignore[attr-defined]
    return data


def test_official_accuracy_over_what_was_asked(results: Path, of_vqa: Any, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = evaluate(of_vqa)
    assert metrics["accuracy_number"] == metrics["accuracy_yes_no"] == 100
    assert metrics["accuracy_other"] == pytest.approx(by_hand(["dog"] * 2 + ["cat"] * 8, "dog"), abs=1e-4)
    assert metrics["accuracy"] == metrics["agg_metrics"] == pytest.approx((200 + metrics["accuracy_other"]) / 3, abs=1e-4)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="has no answers to 1 of 1 questions, the first 5"):
        official_accuracy({5: "x"}, of_vqa.coco_fmt_anno_file, of_vqa.coco_fmt_qust_file)


def by_hand(people: list[str], said: str) -> float:
    """VQA accuracy as its authors define it."""
    each = [min(1.0, (people[:n] + people[n + 1 :]).count(said) / 3) for n in range(10)]
    return 100 * sum(each) / 10


def test_ten_answers_are_ten_people() -> None:
    draw = random.Random(0)
    people = [[draw.choice(["dog", "cat", "red fox"]) for _ in range(10)] for _ in range(30)]
    said = [draw.choice(["dog", "cat", "red fox", "cow"]) for _ in people]
    expected = sum(by_hand(answers, one) for answers, one in zip(people, said, strict=True)) / 30
    assert accuracy(said, people) == pytest.approx(expected, abs=1e-4)
    assert accuracy([f"The {one}." for one in said], people) == pytest.approx(expected, abs=1e-4)
    # One question with another number of answers: then all of them are lists of right ones.
    assert accuracy(["dog", "cow"], [["dog"] + ["cat"] * 9, ["cow", "cattle"]]) == 100


def test_normalising() -> None:
    assert normalized("Two, the  DOGS!\n") == normalized("2 dogs")
    assert normalized("dont") == "don't"


def test_lemmatizing(monkeypatch: pytest.MonkeyPatch) -> None:
    word = {
        "dogs": SimpleNamespace(lemma_="dog", pos_="NOUN", text="dogs"),
        "better": SimpleNamespace(lemma_="good", pos_="ADJ", text="better"),
    }
    spacy = SimpleNamespace(
        load=lambda name: lambda text: [word[w] for w in text.split()], util=SimpleNamespace(is_package=lambda name: True)
    )
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    task = MafaVqaTask(run_block(lemmatize=True))
    assert task.lemmatized is not None and task.lemmatized("better dogs") == "better dog"
    spacy.util.is_package = lambda name: False
    with pytest.raises(UserError, match="run.lemmatize is true, .* python -m spacy download en_core_web_sm"):
        MafaVqaTask(run_block(lemmatize=True))
