"""Statements about two images: one's own in every format, the scenes' and LAVIS's, and what is wrong with them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from PIL import Image

from annotation_files import config, write
from lavis_mafa.datasets.annotations import read_annotations
from lavis_mafa.datasets.builders import GritStatementsBuilder
from lavis_mafa.datasets.formats import STATEMENTS
from lavis_mafa.datasets.indexed import IndexedDataset
from lavis_mafa.datasets.splits import with_training_splits
from lavis_mafa.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"image0": "a.png", "image1": "b.png", "sentence": "Both are red.", "label": "true"},
    {"image0": "b.png", "image1": "a.png", "sentence": "One is blue", "label": "False"},
    {"image0": "a.png", "image1": "a.png", "sentence": "They are equal", "label": "TRUE"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("a", "black"), ("b", "white")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{name}.png")
    return tmp_path


def build(folder: Path, **files: Path) -> Any:
    annotations = {split: {"storage": str(file)} for split, file in files.items()}
    return GritStatementsBuilder(
        config(GritStatementsBuilder, annotations=annotations, images={"storage": str(folder)})
    ).build_datasets()


def as_nlvr2(row: dict[str, Any]) -> dict[str, Any]:
    """In one column, with a truth value."""
    rest = {name: value for name, value in row.items() if not name.startswith("image")}
    return {"images": [row["image0"], row["image1"]], **rest, "label": row["label"].lower() == "true"}


@pytest.mark.parametrize(
    ("suffix", "form"),
    [(".csv", dict), (".tsv", dict), *((suffix, form) for suffix in (".json", ".jsonl", ".parquet") for form in (dict, as_nlvr2))],
)
def test_every_format_gives_the_same_samples(folder, suffix, form):
    rows = [{**form(row), "sentence_id": number, "more": "x"} for number, row in enumerate(ROWS, 7)]
    data = build(folder, train=write(folder / f"s{suffix}", rows))["train"]
    batch = data.collater([data[index] for index in range(3)])
    assert batch["text_input"] == ["both are red", "one is blue", "they are equal"]
    assert batch["label"].tolist() == [1, 0, 1] and data.class_labels == {"False": 0, "True": 1}
    assert batch["sentence_id"].tolist() == [7, 8, 9] and batch["index"].tolist() == [0, 1, 2]
    bright = torch.stack([batch["image0"], batch["image1"]], dim=1).mean(dim=(2, 3, 4)) > 0  # normalised: black is below
    assert bright.tolist() == [[False, True], [True, False], [False, False]]


def test_two_splits_may_be_trained_on(folder):
    parts = build(folder, train=write(folder / "a.csv", ROWS), val=write(folder / "b.csv", ROWS[:2]))
    joined = with_training_splits({"grit_statements": parts}, ["train", "val"])["grit_statements"]["train"]
    assert len(joined) == 5 and joined[4]["label"] == joined[1]["label"]


def test_scenes_are_read_as_they_are(scenes):
    data = build(scenes, **{split: scenes / f"statements_{split}.parquet" for split in ("train", "val", "test")})
    for split, part in data.items():
        told = pyarrow.parquet.read_table(scenes / f"statements_{split}.parquet").to_pylist()
        assert [part[row]["label"] for row in range(len(part))] == [row["label"] for row in told]
        assert [part.table[name][0].as_py() for name in part.images] == told[0]["images"]


def test_the_pages_snippet_makes_rows_of_nlvr2s(tmp_path, monkeypatch):
    """Its layout: a line a sentence, without paths; training images lie in numbered folders."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs/downstream.md").read_text()
    (snippet,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "identifier" in code]
    told = {"train": {"identifier": "train-10171-0-0", "directory": 54}, "dev": {"identifier": "dev-850-0-1"}}
    told["test1"] = {"identifier": "test1-0-1-0"}
    for split, row in told.items():
        (tmp_path / f"{split}.json").write_text(
            json.dumps({**row, "sentence": "An empty glass.", "label": "True", "left_url": "x"}) + "\n"
        )
    exec(snippet, {})
    tables = {split: read_annotations([tmp_path / f"nlvr2_{split}.jsonl"], STATEMENTS) for split in told}
    assert tables["train"]["image1"][0].as_py() == "images/train/54/train-10171-0-img1.png"
    assert tables["dev"]["image0"][0].as_py() == "dev/dev-850-0-img0.png"
    assert tables["test1"]["sentence_id"][0].as_py() == "test1-0-1-0" and tables["dev"]["label"][0].as_py() == "True"


def test_a_file_may_have_its_own_folder(folder):
    (folder / "sub").mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.png").rename(folder / "sub" / f"{name}.png")
    storage = {"annotations": str(write(folder / "s.jsonl", ROWS)), "images": str(folder / "sub")}
    info = {"annotations": {"train": {"storage": storage}}, "images": {"storage": str(folder)}}
    assert GritStatementsBuilder(config(GritStatementsBuilder, **info)).build_datasets()["train"][0]["image1"].mean() > 0


@pytest.mark.parametrize("which", ["image0", "image1"])
def test_an_image_that_cannot_be_read_is_a_bad_sample_with_its_path(folder, which):
    (folder / "torn.png").write_bytes((folder / "a.png").read_bytes()[:40])
    data = build(folder, train=write(folder / "s.jsonl", [*ROWS, {**ROWS[0], which: "torn.png"}]))["train"]
    indexed = IndexedDataset(data)
    batch = indexed.collate(indexed.__getitems__([3, 1]))
    (bad,) = batch["bad_samples"]
    assert bad["index"] == 3 and str(folder / "torn.png") in bad["reason"] and str(folder / "torn.png") in bad["image"]
    assert batch["label"].tolist() == [0, 0] and batch["index"].tolist() == [1, 1]


ONE = {"images": ["a.png", "b.png"], "sentence": "x", "label": True}
WRONG = [
    ({**ONE, "label": "maybe"}, "row 2: label is 'maybe'; allowed: False, True."),
    ({**ONE, "label": 1}, "row 2: 'label' is 1; allowed: true, false."),
    ({**ONE, "label": None}, "row 2: 'label' is empty; allowed: False, True."),
    ({**ONE, "images": ["a.png"]}, r"row 2: 'images' is \[\"a.png\"\]; allowed: a list of two paths."),
    ({**ONE, "images": "a.png"}, "row 2: 'images' is \"a.png\"; allowed: a list of two paths."),
    ({**ONE, "images": ["a.png", ""]}, "row 2: 'image1' is empty; allowed: a path."),
    ({**ONE, "images": ["a.png", "../b.png"]}, "row 2: image1 is '../b.png'; allowed: a path below the image folder"),
    ({**ONE, "sentence": " "}, "row 2: the sentence is empty or null; allowed: one text a row."),
    ({**ONE, "sentence": 3}, "row 2: 'sentence' is 3; allowed: a text."),
    ({"images": ["a.png", "b.png"], "sentence": "x"}, "row 2: 'label' is empty"),
    ({**ONE, "sentence": "\ud800"}, "half of a character"),
]


@pytest.mark.parametrize(("row", "message"), WRONG)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_wrong_row_is_named(folder, row, message, suffix):
    with pytest.raises(UserError, match=f"s{suffix}.*{message}"):
        read_annotations([write(folder / f"s{suffix}", [ONE, row])], STATEMENTS)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"image": "a.png", "sentence": "x", "label": "true"},
            r"no column 'images' \(two paths\), nor 'image0' and 'image1'; its columns",
        ),
        ({"image0": "a.png", "sentence": "x", "label": "true"}, "no column 'image1'; its columns are image0, sentence, label"),
        ({"image0": "a.png", "image1": "b.png", "label": "true"}, "no column 'sentence'"),
        ({"images": ["a.png", "b.png"], "sentence": "x"}, "no column 'label'"),
    ],
)
def test_a_missing_column_is_named(folder, row, message):
    with pytest.raises(UserError, match=message):
        read_annotations([write(folder / "s.jsonl", [row])], STATEMENTS)
    with pytest.raises(UserError, match="no rows"):
        read_annotations([write(folder / "s.jsonl", [])], STATEMENTS)


@pytest.mark.parametrize("split", ["train", "test"])
def test_one_of_two_images_that_is_not_there_is_named(folder, split):
    file = write(folder / "s.jsonl", [{**ROWS[0], "image1": "none.png"}])
    with pytest.raises(UserError, match=r"s.jsonl, row 1: no image at .*none.png; is .* the folder"):
        build(folder, **{split: file})
