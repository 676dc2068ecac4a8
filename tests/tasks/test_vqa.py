from __future__ import annotations

import json
import logging
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from lavis.common.registry import registry
from lavis.common.vqa_tools.vqa import VQA
from lavis.common.vqa_tools.vqa_eval import VQAEval
from lavis.datasets.datasets.vg_vqa_datasets import VGVQADataset
from lavis.tasks.base_task import BaseTask
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader
from torchvision.transforms.functional import pil_to_tensor

from lavis_mafa.config.schema import typed_block
from lavis_mafa.datasets.pairs import ImageQuestions
from lavis_mafa.errors import UserError
from lavis_mafa.tasks.answer_list import own_answers
from lavis_mafa.tasks.vqa import MafaGqaTask, MafaVqaTask
from lavis_mafa.tasks.vqa_accuracy import Question, accuracy, normalized, official_accuracy

ANSWERS = [["dog", "puppy"], ["2"], ["yes"]]
SAID = ["A dog.", "two", "no"]
CONFIG = SimpleNamespace(datasets_cfg={})


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(registry.mapping["paths"], "result_dir", str(tmp_path / "result"))
    return tmp_path / "result"


def run_block(**changes: Any) -> SimpleNamespace:
    settings = {"num_beams": 4, "max_len": 9, "min_len": 2, "length_penalty": -0.5, "prompt": "Question: {} Answer:"}
    settings |= {
        "inference": None,
        "answer_list": None,
        "num_ans_candidates": None,
        "evaluate": True,
        "train_splits": [],
        "valid_splits": [],
        "test_splits": [],
    }
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
    answer_list: list[str] | None = None
    extra = {"index": [0, 1, 2]}


class OfGqa(Questions):
    extra = {"answer": ["dog", "2", "yes"]}


class Model:
    """Gives prepared answers, and spoils the batch as LAVIS's models do."""

    def predict_answers(self, samples: dict[str, Any], **asked: Any) -> list[str]:
        self.asked = asked
        samples["text_input"] = ["spoilt" for _ in samples["text_input"]]
        return [f" {SAID[int(n)]} " for n in samples["image"]]


def as_lists(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def evaluate(dataset: Any, cls: Any = MafaVqaTask, model: Any = None, collate: Any = None) -> Any:
    task = cls(run_block())
    result = task.evaluation(model or Model(), DataLoader(dataset, batch_size=2, collate_fn=collate), cuda_enabled=False)
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


@pytest.mark.parametrize(("arch", "candidates"), [("albef_vqa", None), ("blip_vqa", 2), ("albef_vqa_mafa", None)])
def test_models_rank_what_a_set_lists(arch: str, candidates: int | None, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = OwnQuestions(), Model()
    data.answer_list = ["dog", "2", "dog", "yes"]
    monkeypatch.setattr(BaseTask, "build_datasets", lambda self, cfg: {"own": {"val": data}})
    values = {"task": "mafa_vqa", "num_ans_candidates": candidates, "evaluate": True, "valid_splits": ["val"]}
    task = MafaVqaTask(typed_block("run", values))
    task.arch = arch
    task.build_datasets(CONFIG)
    task.evaluation(model, DataLoader(data, batch_size=2), cuda_enabled=False)
    wanted = {"inference_method": "rank", "answer_list": ["dog", "2", "yes"], "num_ans_candidates": candidates or 3}
    assert model.asked == wanted


def test_all_answers_that_are_trained_on_are_ranked() -> None:
    """Of one split or several, joined or not."""
    tables = [pa.table({"image": ["a"] * 2, "question": ["?"] * 2, "answer": said}) for said in (ANSWERS[:2], [["2"], ["x"]])]
    parts = [ImageQuestions(str, str, ".", table) for table in tables]
    assert own_answers(Questions(), parts) == own_answers(Questions(), [ConcatDataset(parts)]) == ["dog", "puppy", "2", "x"]
    assert own_answers(Questions(), [Questions()]) is None and own_answers(Questions(), []) is None


def test_gqa_is_exact_match_after_normalising(results: Path) -> None:
    assert evaluate(OfGqa(), MafaGqaTask)["accuracy"] == pytest.approx(200 / 3)


def test_without_answers_there_is_the_file_alone(results: Path) -> None:
    assert evaluate(Questions()) is None
    assert (results / "val_vqa_result.json").is_file()


PEOPLE = [["dog"] * 2 + ["cat"] * 8, ["2"] * 10, ["yes"] * 5 + ["no"] * 5, ["x"] * 10]


def official(tmp_path: Path, people: list[list[Any]] = PEOPLE, **changes: Any) -> Any:
    """A LAVIS data set with files of VQAv2's form, which know one question more than is asked."""
    kinds = ["other", "number", "yes/no", "other"]
    annotations = []
    for n, (kind, answers) in enumerate(zip(kinds, people, strict=True)):
        given = [{"answer_id": i, "answer": answer} for i, answer in enumerate(answers)]
        row = {"question_id": 100 + n, "image_id": n, "question_type": "what", "answer_type": kind, "answers": given}
        row |= {name: change(row[name]) for name, change in changes.items()}
        annotations.append({name: value for name, value in row.items() if value is not None})
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    data: Any = Questions()
    data.coco_fmt_anno_file = str(tmp_path / "annotations.json")
    return data


def test_official_accuracy_over_what_was_asked(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = evaluate(official(tmp_path))
    assert metrics["accuracy_number"] == metrics["accuracy_yes_no"] == 100
    assert metrics["accuracy_other"] == pytest.approx(by_hand(["dog"] * 2 + ["cat"] * 8, "dog"), abs=1e-4)
    assert metrics["accuracy"] == metrics["agg_metrics"] == pytest.approx((200 + metrics["accuracy_other"]) / 3, abs=1e-4)
    assert capsys.readouterr().out == ""
    assert evaluate(official(tmp_path), MafaGqaTask) == metrics, "mafa_gqa takes a set as it is"


FORMS: dict[str, dict[str, Any]] = {
    "no answer_id": {"answers": lambda given: [{"answer": one["answer"], "answer_confidence": "yes"} for one in given]},
    "one answer_id": {"answers": lambda given: [{**one, "answer_id": 1} for one in given]},
    "plain texts": {"answers": lambda given: [one["answer"] for one in given]},
    "no types": {"question_type": lambda _: None, "answer_type": lambda _: None},
    "ids as texts": {"question_id": str},
    "ids as floats": {"question_id": float},
}


@pytest.mark.parametrize("form", FORMS)
def test_annotations_of_other_sets_give_the_same_accuracy(results: Path, tmp_path: Path, form: str) -> None:
    """VizWiz has no answer_id, others no types."""
    wanted = evaluate(official(tmp_path))
    found = evaluate(official(tmp_path, **FORMS[form]))
    assert found == wanted if form != "no types" else found == {name: wanted[name] for name in ("accuracy", "agg_metrics")}


def test_annotations_that_do_not_fit_are_found_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = official(tmp_path)
    data.annotation = [{"question_id": number} for number in (100, 5, 6)]
    monkeypatch.setattr(BaseTask, "build_datasets", lambda self, cfg: {"coco_vqa": {"val": data}})
    task = MafaVqaTask(run_block(valid_splits=["val"]))
    with pytest.raises(UserError, match="datasets.coco_vqa, split 'val': .* have no answers to 2 of 3 questions, the first 5"):
        task.build_datasets(CONFIG)
    for content, message in (
        ("{", "is not JSON"),
        ("[]", "has no list 'annotations'"),
        ('{"annotations": [{"question_id": 1}]}', r"annotations\[0\] has no question_id with a list of answers"),
        ('{"annotations": [{"question_id": 1, "answers": [{"answer_id": 1}]}]}', r"annotations\[0\] has no"),
        (
            '{"annotations": [{"question_id": true, "answers": ["a"]}]}',
            r"annotations\[0\].question_id is true; allowed: text or a whole",
        ),
        (
            '{"annotations": [{"question_id": 1, "answers": ["a"]}, {"question_id": 1, "answers": ["b"]}]}',
            r"\[1\] has other answers to .* 1",
        ),
    ):
        Path(data.coco_fmt_anno_file).write_text(content)
        with pytest.raises(UserError, match=message):
            MafaVqaTask(run_block(valid_splits=["val"])).build_datasets(CONFIG)
    data.coco_fmt_anno_file = str(tmp_path / "gone.json")
    with pytest.raises(UserError, match="gone.json cannot be read"):
        MafaVqaTask(run_block(valid_splits=["val"])).build_datasets(CONFIG)


def test_the_official_accuracy_is_lavis_vqa_eval() -> None:
    """Where ten different answer_ids are given, and no answer is empty."""
    draw = random.Random(3)
    words = ["dog", "The dog", "a", "two", "2", "dogs.", "red, fox", "dont", "cat/dog", "1,000", "yes\n"]
    people = {n: [draw.choice(words) for _ in range(10)] for n in range(60)}
    people |= {60 + n: [word] * 10 for n, word in enumerate(words * 3)}  # alike: then nothing is normalised
    said = {n: draw.choice([*words, draw.choice(of)]) for n, of in people.items()}
    truth, answers = VQA(), VQA()
    truth.qa = {
        n: {
            "question_id": n,
            "question_type": "",
            "answer_type": "x",
            "answers": [{"answer_id": i, "answer": a} for i, a in enumerate(of)],
        }
        for n, of in people.items()
    }
    truth.dataset = {"annotations": list(truth.qa.values())}
    truth.getQuesIds = lambda: list(people)
    answers.qa = {n: {"answer": answer} for n, answer in said.items()}
    evaluation = VQAEval(truth, answers, n=6)
    evaluation.updateProgress = lambda progress: None
    evaluation.evaluate(list(people))
    found = official_accuracy(said, {n: Question(of, "x") for n, of in people.items()})
    assert found["accuracy"] == found["accuracy_x"] == pytest.approx(evaluation.accuracy["overall"], abs=1e-3)
    each = {n: official_accuracy({n: said[n]}, {n: Question(people[n], None)})["accuracy"] for n in people}
    assert each == pytest.approx(evaluation.evalQA, abs=1e-3) and len(set(each.values())) > 4


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 11])
def test_people_who_all_agree_are_right_however_many_they_are(count: int) -> None:
    of = Question(["dog"] * count, "yes/no or number")
    assert official_accuracy({1: "dog"}, {1: of}).keys() == {"accuracy", "accuracy_yes_no_or_number"}
    assert (accuracy(["cat"], [[*of.answers, "cat"]]) == 100) == (count != 9), "ten answers are those of ten people"
    assert official_accuracy({1: "A dog."}, {1: of})["accuracy"] == accuracy(["A dog."], [of.answers]) == 100
    assert official_accuracy({1: "cat"}, {1: of})["accuracy"] == official_accuracy({1: ""}, {1: of})["accuracy"] == 0
    some = official_accuracy({1: "cat"}, {1: Question([*of.answers, "cat"], None)})["accuracy"]
    assert some == (100 if count < 3 else pytest.approx(100 / 3 * count / (count + 1))), (
        "a right answer, or one of four or more people's"
    )


def by_hand(people: list[str], said: str) -> float:
    """VQA accuracy as its authors define it."""
    each = [min(1.0, (people[:n] + people[n + 1 :]).count(said) / 3) for n in range(10)]
    return 100 * sum(each) / 10


def test_ten_answers_are_ten_people() -> None:
    draw = random.Random(0)
    people = [[draw.choice(["dog", "cat", "red fox"]) for _ in range(10)] for _ in range(30)]
    said = [draw.choice(["dog", "cat", "red fox", "cow"]) for _ in people]
    each = [by_hand(answers, one) for answers, one in zip(people, said, strict=True)]
    assert accuracy(said, people) == pytest.approx(sum(each) / 30, abs=1e-4)
    assert accuracy([f"The {one}." for one in said], people) == pytest.approx(sum(each) / 30, abs=1e-4)
    assert accuracy(said, [[f"A {one}!" for one in of] for of in people]) == pytest.approx(sum(each) / 30, abs=1e-4)
    at_once = [100 * min(1.0, of.count(one) / 3) for one, of in zip(said, people, strict=True)]
    assert accuracy(said, people, leave_one_out=False) == pytest.approx(sum(at_once) / 30, abs=1e-4)
    # One question with another number of answers is a list of right ones; it changes nothing for the others.
    few = ["cow", *["cattle"] * 8]
    assert accuracy([*said, "cow"], [*people, few]) == pytest.approx((sum(each) + 100) / 31, abs=1e-4)
    assert accuracy(["cow", *said], [few, *people]) == pytest.approx((sum(each) + 100) / 31, abs=1e-4)
    assert accuracy(["cow", "dog"], [["cattle", "Cow."], ["cattle", "Cow."]]) == 50


@pytest.mark.parametrize("right", [["a"], ["the"], ["", "an"], ["."], ["dog"] * 9 + [""], ["a"] * 10, [""] * 10])
@pytest.mark.parametrize("said", ["", " ", "."])
def test_an_empty_answer_is_never_right(said: str, right: list[str]) -> None:
    assert said == "." in right or accuracy([said], [right]) == 0
    assert said == "." in right or official_accuracy({1: said}, {1: Question(right, None)})["accuracy"] == 0


def test_an_article_alone_is_an_answer() -> None:
    assert accuracy(["A", "the", "a dog"], [["a"], ["a"], ["dog"]]) == pytest.approx(200 / 3)


def test_a_question_without_answers_takes_not_those_of_the_others(results: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = OwnQuestions()
    data.answers = [[], *ANSWERS[1:]]
    assert evaluate(data)["accuracy"] == 50
    assert "1 of 3 questions have no right answers" in caplog.text


def test_a_okvqas_direct_answers(results: Path) -> None:
    """min(1, matches / 3) of ten people at once."""
    data = Questions()
    data.extra = {"direct_answers": [["dog"] * 2 + ["cat"] * 8, ["two"] * 3 + ["one"] * 7, ["yes"] * 10]}
    assert evaluate(data, collate=as_lists)["accuracy"] == pytest.approx(100 * (2 / 3 + 1 + 0) / 3)
    data.extra = {"direct_answers": [None] * 3}
    assert evaluate(data, collate=as_lists) is None


@pytest.mark.parametrize("ids", [["01827492", "1827492", "x/7"], [2**70, 7, "7"], ["a", "a", "b"], ["a" * 22, "2" * 22, "3"]])
def test_ids_stay_what_they_are(results: Path, ids: list[Any]) -> None:
    class Own(OwnQuestions):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {**super().__getitem__(index), "question_id": ids[index]}

    assert evaluate(Own(), collate=as_lists)["accuracy"] == pytest.approx(200 / 3)
    written = json.loads((results / "val_vqa_result.json").read_text())
    assert written == [{"question_id": name, "answer": answer} for name, answer in zip(ids, SAID, strict=True)]


def test_mafa_gqa_takes_other_sets_as_they_are(results: Path) -> None:
    assert evaluate(OwnQuestions(), MafaGqaTask) == evaluate(OwnQuestions())


def test_training_is_for_sets_and_models_with_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: dict[str, Any] = {
        "coco_vqa": {"train": [{"text_input": "?", "answers": ["a"], "weights": [1]}]},
        "pairs": {"train": [{"image": 1}]},
    }
    monkeypatch.setattr(BaseTask, "build_datasets", lambda self, cfg: parts)
    run = {"train_splits": ["train"], "evaluate": False, "task": "mafa_vqa"}
    with pytest.raises(UserError, match="datasets.pairs has no answers in its split 'train', but mafa_vqa trains on them"):
        MafaVqaTask(run_block(**run)).build_datasets(CONFIG)
    del parts["pairs"]
    MafaVqaTask(run_block(**run)).build_datasets(CONFIG)
    monkeypatch.setattr(BaseTask, "build_model", lambda self, cfg: torch.nn.Linear(1, 1))
    cfg: Any = SimpleNamespace(model_cfg=SimpleNamespace(arch="blip2_t5"))
    with pytest.raises(UserError, match="which trains on answers, but blip2_t5 does not read them; allowed: blip2_opt_mafa, albef_vqa"):
        MafaVqaTask(run_block(**run)).build_model(cfg)
    task = MafaVqaTask(run_block(**{**run, "evaluate": True}))
    task.build_model(cfg)
    seen: list[Any] = []
    model: Any = lambda samples: seen.append(samples) or {"loss": 7}  # noqa: E731
    assert task.train_step(model, {"answer": ["x"]}) == 7 and seen == [{"answer": ["x"], "prompt": "Question: {} Answer:"}]


def test_answers_of_visual_genome_weigh_what_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LAVIS says 0.2, ALBEF 0.5."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "vg.json").write_text(json.dumps([{"image": "a.png", "question": "who?", "answer": "nobody"}] * 2))
    data = VGVQADataset(pil_to_tensor, str, str(tmp_path), [str(tmp_path / "vg.json")])
    monkeypatch.setattr(BaseTask, "build_datasets", lambda self, cfg: {"vg_vqa": {"train": data}})
    for info, weight in (({}, 0.2), ({"answer_weight": 0.5}, 0.5)):
        cfg = SimpleNamespace(datasets_cfg=OmegaConf.create({"vg_vqa": {"build_info": info}}))
        train = MafaVqaTask(run_block(train_splits=["train"], evaluate=False)).build_datasets(cfg)["vg_vqa"]["train"]
        assert len(train) == 2 and train.collater([train[0], train[1]])["weight"].tolist() == pytest.approx([weight] * 2)
        assert train[0]["answers"] == ["nobody"] and train[1]["text_input"] == "who?"


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
    model: Any = SimpleNamespace(predict_answers=lambda samples, **_: ["better dogs"] * len(samples["image"]))
    found = task.evaluation(model, DataLoader(OwnQuestions(), batch_size=2), cuda_enabled=False)
    assert found is not None and [a.answer for a in found["answered"].values()] == ["better dog"] * 3
    spacy.util.is_package = lambda name: False
    with pytest.raises(UserError, match="run.lemmatize is true, .* python -m spacy download en_core_web_sm"):
        MafaVqaTask(run_block(lemmatize=True))
