from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from lavis.datasets.datasets.coco_vqa_datasets import COCOVQADataset
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from annotation_files import config, write
from lavis_mafa.datasets.annotations import read_annotations
from lavis_mafa.datasets.builders import GritEmojiBuilder, GritPairsBuilder, GritVqaBuilder
from lavis_mafa.datasets.formats import QUESTIONS
from lavis_mafa.datasets.pairs import ImageQuestions, ImageTextPairs, split_at_random
from lavis_mafa.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"image": "a.png", "question": "What is this, then?", "answer": "a dog", "question_id": 70},
    {"image": "b.png", "question": "Is it red?", "answer": "yes", "question_id": 9},
    {"image": "a.png", "question": "How many?", "answer": "two", "question_id": 8},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_questions(folder: Path, suffix: str) -> None:
    table = read_annotations([write(folder / f"q{suffix}", [{**row, "split": 3} for row in ROWS])], QUESTIONS)
    data = ImageQuestions(pil_to_tensor, str.upper, folder, table)
    assert data.answers == [["a dog"], ["yes"], ["two"]]
    batch = data.collater([data[index] for index in range(len(data))])
    assert batch["image"].shape == (3, 3, 4, 4)
    assert batch["text_input"] == [row["question"].upper() for row in ROWS]
    assert batch["question_id"].tolist() == data.question_ids == [70, 9, 8]
    assert batch["index"].tolist() == [0, 1, 2]
    assert (batch["answer"], batch["n_answers"].tolist()) == (["a dog", "yes", "two"], [1, 1, 1])


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_lists_of_answers_and_rows_as_ids(folder: Path, suffix: str) -> None:
    rows = [
        {"image": "a.png", "question": "what?", "answer": ["dog", "puppy"]},
        {"image": "b.png", "question": "x?", "answer": ["cat"]},
    ]
    data = ImageQuestions(pil_to_tensor, str, folder, read_annotations([write(folder / f"q{suffix}", rows)], QUESTIONS))
    assert data.answers == [["dog", "puppy"], ["cat"]]
    assert [data[index]["question_id"] for index in range(2)] == [0, 1]
    assert data.distinct_answers() == ["dog", "puppy", "cat"]


def test_answers_weigh_as_many_people_gave_them(folder: Path) -> None:
    """As LAVIS's coco_vqa has them; joined with its samples, which have no ids, too."""
    people = ["red"] * 5 + ["dark red"] * 3 + ["pink", "Red"]
    rows = [{"image": "a.png", "question": "what colour?", "answer": people}, {**ROWS[0], "question_id": None}]
    (folder / "lavis.json").write_text(json.dumps(rows[:1]))
    data = ImageQuestions(pil_to_tensor, str, folder, read_annotations([write(folder / "q.jsonl", rows)], QUESTIONS))
    theirs = COCOVQADataset(pil_to_tensor, str, str(folder), [str(folder / "lavis.json")])
    own, other = data.collater([data[0], data[1]]), theirs.collater([theirs[0], data[1]])
    for name in ("answer", "text_input"):
        assert own[name] == other[name]
    for name in ("image", "weight", "n_answers"):
        torch.testing.assert_close(own[name], other[name])
    assert data.collater([{k: v for k, v in data[0].items() if k in theirs[0]}])["answer"] == ["red", "dark red", "pink", "Red"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": "a.png", "question": "what?"}], r"q.csv: no column 'answer'; its columns are image, question\."),
        ([{**ROWS[0], "answer": ""}], "row 1: the answer is empty"),
        ([ROWS[1], {**ROWS[0], "question": ""}], "row 2: 'question' is empty; allowed: a text"),
        ([ROWS[1], {**ROWS[0], "question": " \t"}], "row 2: 'question' is empty; allowed: a text"),
        ([ROWS[1], {**ROWS[0], "question": "nan"}], "row 2: the question 'nan' is how a missing one is written"),
        ([ROWS[0], {**ROWS[1], "question_id": ""}], "q.csv, row 2: no question_id; allowed: one in every row"),
        ([ROWS[0], {**ROWS[1], "answer": "['yes', 'no']"}], r"q.csv, row 2: the answer .* is a printed list; allowed: one text a row"),
        ([ROWS[0], ROWS[1], ROWS[0]], "q.csv: question_id 70 is there twice, in rows 1 and 3"),
    ],
)
def test_wrong_questions(folder: Path, rows: list[dict[str, Any]], message: str) -> None:
    annotations = {"test": {"storage": str(write(folder / "q.csv", rows))}}
    with pytest.raises(UserError, match=message):
        GritVqaBuilder(config(GritVqaBuilder, annotations=annotations, images={"storage": str(folder)})).build_datasets()


def test_vqa_builder(folder: Path) -> None:
    file = str(write(folder / "q.jsonl", ROWS))
    annotations = {"val": {"storage": file}, "test": {"storage": [file]}}
    block = config(GritVqaBuilder, annotations=annotations, images={"storage": str(folder)}, max_images=2)
    data = GritVqaBuilder(block).build_datasets()
    assert set(data) == {"val", "test"} and len(data["test"]) == 2
    assert data["val"][0]["text_input"] == "what is this, then?"
    both = config(GritVqaBuilder, annotations={"train": {"storage": file}}, images={"storage": str(folder)})
    assert GritVqaBuilder(both).build_datasets()["train"][0]["image"].shape == (3, 384, 384)
    with pytest.raises(UserError, match="annotations.tests is not a key; allowed: train, val, test"):
        GritVqaBuilder(config(GritVqaBuilder, annotations={"tests": {"storage": file}})).build_datasets()


def test_emoji_questions_have_all_true_names_as_answers(emoji: Path) -> None:
    data = GritEmojiBuilder(config(GritEmojiBuilder, root=str(emoji), view="questions", max_concepts=60)).build_datasets()
    assert isinstance(data["train"], ImageTextPairs)
    rows = [json.loads(line) for line in (emoji / "seen.jsonl").read_text().splitlines()]
    truth = pyarrow.parquet.read_table(emoji / "truth.parquet").to_pylist()
    right: dict[str, set[str]] = {}
    for entry in truth:
        if entry["kind"] in ("name", "alias"):
            right.setdefault(entry["concept"], set()).add(entry["text"])
    concept_of = {row["image"]: row["concept"] for row in rows}
    for split in ("val", "test"):
        assert set(data[split].questions) == {"what is this?"} and len(data[split]) > 0
    for image, answers in zip(data["val"].table["image"].to_pylist(), data["val"].answers, strict=True):
        assert set(answers) == right[concept_of[image]]


def test_prefix_and_rest_are_the_caption(folder: Path) -> None:
    file = write(folder / "a.json", [{"image": "a.png", "caption": "A dog runs  fast"}, {"image": "b.png", "caption": "Cat"}])
    data = ImageTextPairs(pil_to_tensor, str.lower, folder, [file], prefix_lm=True)
    random.seed(0)
    seen = {(sample["text_input"], sample["text_output"]) for sample in (data[0] for _ in range(40))}
    assert seen == {("a", "dog runs fast"), ("a dog", "runs fast"), ("a dog runs", "fast")}
    assert (data[1]["text_input"], data[1]["text_output"]) == ("", "cat")
    assert split_at_random("") == ("", "")
    assert data.collater([data[0], data[1]])["text_output"][1] == "cat"


def test_prefixes_are_for_training_alone(emoji: Path) -> None:
    data = GritEmojiBuilder(config(GritEmojiBuilder, root=str(emoji), prefix_lm=True, max_concepts=60)).build_datasets()
    assert {"text_input", "text_output"} <= set(data["train"][0])
    assert set(data["val"][3]) == {"image", "index", "image_id"} and data["val"][3]["image_id"] == 3
    for wrong, message in (
        ({"prefix_lm": 1}, "prefix_lm is 1; allowed: true, false"),
        ({"view": "question"}, "Did you mean 'questions'"),
    ):
        with pytest.raises(UserError, match=message):
            GritEmojiBuilder(config(GritEmojiBuilder, root=str(emoji), **wrong)).build_datasets()


def test_original_and_mined_pairs_in_one_file(folder: Path) -> None:
    rows = [
        {"image": "a.png", "caption": "a dog", "source": "original", "score": None},
        {"image": "b.png", "caption": "a cat", "source": "original", "score": None},
        {"image": "a.png", "caption": "a small pet", "source": "mined", "score": 0.93},
    ]
    file = write(folder / "pairs.parquet", rows)
    annotations = {"train": {"storage": str(file)}}
    block = config(GritPairsBuilder, annotations=annotations, images={"storage": str(folder)})
    data = GritPairsBuilder(block).build_datasets()["train"]
    assert [data.captions(row) for row in range(3)] == [["a dog"], ["a cat"], ["a small pet"]]
    # One image, whichever row it is in.
    assert data.image_keys.tolist() == [0, 1, 0]
    assert isinstance(data[2]["image"], torch.Tensor) and data[2]["text_input"] == "a small pet"
