"""Sentences with a label: one's own in every format, and the scenes'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from PIL import Image

from annotation_files import config, write
from lavis_mafa.config.data import ENTAILMENT
from lavis_mafa.datasets.builders import GritEntailmentBuilder
from lavis_mafa.datasets.splits import with_training_splits

ROWS: list[dict[str, Any]] = [
    {"image": "a.png", "sentence": "It is red.", "label": "entailment"},
    {"image": "b.png", "sentence": "Nobody knows", "label": "neutral"},
    {"image": "a.png", "sentence": "It is blue", "label": "contradiction"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / f"{name}.png")
    return tmp_path


def build(folder: Path, **files: Path) -> Any:
    annotations = {split: {"storage": str(file)} for split, file in files.items()}
    return GritEntailmentBuilder(
        config(GritEntailmentBuilder, annotations=annotations, images={"storage": str(folder)})
    ).build_datasets()


@pytest.mark.parametrize("name", ["sentence", "caption"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_samples(folder, suffix, name):
    rows = [{name if key == "sentence" else key: value for key, value in row.items()} for row in ROWS]
    data = build(folder, train=write(folder / f"s{suffix}", rows))["train"]
    batch = data.collater([data[index] for index in range(3)])
    assert batch["text_input"] == ["it is red", "nobody knows", "it is blue"]
    assert [ENTAILMENT[label] for label in batch["label"]] == [row["label"] for row in ROWS]
    assert batch["image"].shape[:2] == (3, 3) and batch["index"].tolist() == batch["sentence_id"].tolist() == [0, 1, 2]
    assert data.image_keys.tolist() == [0, 1, 0] and data.image_path(1) == folder / "b.png"


def test_of_two_names_the_sentence_is_taken(folder):
    rows = [{**row, "caption": "another", "sentence_id": f"0{n}"} for n, row in enumerate(ROWS)]
    data = build(folder, test=write(folder / "s.csv", rows))["test"]
    assert data[0]["text_input"] == "it is red" and data.sentence_ids == ["00", "01", "02"]


def test_files_of_both_names_are_joined(folder):
    one, two = write(folder / "1.jsonl", ROWS[:1]), write(folder / "2.jsonl", [{"image": "b.png", "caption": "x", "label": "neutral"}])
    block = config(GritEntailmentBuilder, annotations={"train": {"storage": [str(one), str(two)]}}, images={"storage": str(folder)})
    data = GritEntailmentBuilder(block).build_datasets()["train"]
    assert [data[n]["text_input"] for n in (0, 1)] == ["it is red", "x"]


def test_two_splits_may_be_trained_on(folder):
    parts = build(folder, train=write(folder / "a.csv", ROWS), val=write(folder / "b.csv", ROWS[:2]))
    joined = with_training_splits({"grit_entailment": parts}, ["train", "val"])["grit_entailment"]["train"]
    assert len(joined) == 5 and joined[4]["label"] == joined[1]["label"]


def test_scenes_are_read_as_they_are(scenes):
    data = build(scenes, **{split: scenes / f"entailment_{split}.parquet" for split in ("train", "val", "test")})
    for split, part in data.items():
        told = pyarrow.parquet.read_table(scenes / f"entailment_{split}.parquet").to_pylist()
        labels = [part[row]["label"] for row in range(len(part))]
        assert [ENTAILMENT[label] for label in labels] == [row["label"] for row in told]
        assert torch.tensor(labels).bincount().tolist() == [len(told) // 3] * 3
        assert part[0]["text_input"] == told[0]["sentence"] and part[0]["image"].shape == (3, 384, 384)
