"""``run.train_splits``: all rows of the splits it names are trained on, and nothing is dropped in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lavis.datasets.datasets.base_dataset import BaseDataset
from PIL import Image

from lavis_mafa.datasets.formats import SAME_IMAGE
from lavis_mafa.datasets.indexed import IndexedDataset
from lavis_mafa.datasets.pairs import ImageTextPairs, RetrievalPairs
from lavis_mafa.datasets.splits import shared_keys, with_training_splits
from lavis_mafa.errors import UserError

ids = st.fixed_dictionaries({image: st.sampled_from([image, "1", "2"]) for image in "abcdef"})
split = st.tuples(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=8), ids)


@settings(max_examples=60, deadline=None)
@given(st.lists(split, min_size=1, max_size=3))
def test_images_are_one_as_their_split_says_and_by_their_path_across(splits):
    """Connected by plain loops: what a split says of its images holds within it alone."""
    tables = [pa.table({"image": images, SAME_IMAGE: pa.array([own[i] for i in images], pa.string())}) for images, own in splits]
    keys = shared_keys(tables).tolist()
    rows = [(number, image, own[image]) for number, (images, own) in enumerate(splits) for image in images]
    assert len(keys) == len(rows)
    for key, (number, image, own) in zip(keys, rows, strict=True):
        for other_key, (other_number, other_image, other_own) in zip(keys, rows, strict=True):
            if number == other_number and own == other_own:
                assert key == other_key
            if not any(own in "12" for _, _, own in rows):
                assert (key == other_key) == (image == other_image)
            if len(splits) == 1:
                assert (key == other_key) == (own == other_own)


@pytest.fixture
def splits(tmp_path) -> dict[str, dict]:
    """``train`` of three rows and a gallery ``val`` of three captions for two images, one of them in training too."""
    for number in range(4):
        Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")

    def rows(name: str, *content: tuple[int, str, str]) -> list[Path]:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"image": f"{i}.png", "caption": c, "concept": k}) + "\n" for i, c, k in content))
        return [path]

    train = rows("train.jsonl", (0, "zero", "x"), (1, "one", "y"), (2, "two", "z"))
    val = rows("val.jsonl", (2, "two again", "z"), (3, "three", "w"), (3, "drei", "w"))
    crop, keep = (lambda image: torch.ones(1)), (lambda image: torch.zeros(1))
    return {"own": {"train": ImageTextPairs(crop, str.upper, tmp_path, train), "val": RetrievalPairs(keep, str, tmp_path, val)}}


def test_both_splits_are_trained_on_and_the_gallery_stays(splits):
    joined = with_training_splits(splits, ["train", "val"])["own"]
    pairs = joined["train"]
    assert joined["val"] is splits["own"]["val"] and len(splits["own"]["train"]) == 3
    samples = [IndexedDataset(pairs)[index] for index in range(len(pairs))]
    assert [s["text_input"] for s in samples] == ["ZERO", "ONE", "TWO", "TWO AGAIN", "THREE", "DREI"]
    assert all(s["image"] == 1 for s in samples), "made as training samples are"
    assert [s["image_key"] for s in samples] == [0, 1, 2, 2, 4, 4]
    truth = pairs.truth.matrix(torch.tensor([s["concept"] for s in samples]), torch.tensor([s["text_key"] for s in samples]))
    assert truth.tolist() == [[a == b for b in "xyzzww"] for a in "xyzzww"]


def test_one_split_or_none(splits):
    assert with_training_splits(splits, ["train"]) is splits and with_training_splits(splits, []) is splits
    assert with_training_splits(splits, ["train", "train"]) is splits
    alone = with_training_splits(splits, ["val"])["own"]["train"]
    assert [alone[index]["text_input"] for index in range(3)] == ["TWO AGAIN", "THREE", "DREI"]
    other = {"own": splits["own"], "more": {"train": splits["own"]["train"]}}
    assert "train" not in with_training_splits(other, ["val"])["more"]


class Captions(BaseDataset):
    """As LAVIS's data sets."""

    def __init__(self, process, *keys: str) -> None:
        self.vis_processor = self.text_processor = process
        self.keys = keys

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict:
        return {key: self.text_processor(f"{key} {index}") for key in self.keys}


def test_of_lavis_those_that_give_what_training_needs():
    train, val = Captions(str.upper, "image", "text_input"), Captions(str, "image", "text_input", "instance_id")
    joined = with_training_splits({"coco": {"train": train, "val": val}}, ["val", "train"])["coco"]["train"]
    assert [joined[index]["text_input"] for index in range(4)] == ["TEXT_INPUT 0", "TEXT_INPUT 1"] * 2
    assert val[0]["text_input"] == "text_input 0", "which is evaluated"
    with pytest.raises(UserError, match=r"run.train_splits names 'val', but datasets.coco gives no 'text_input' there \(Captions\)"):
        with_training_splits({"coco": {"train": train, "val": Captions(str, "image", "image_id")}}, ["train", "val"])
    with pytest.raises(UserError, match="gives no 'answers'"):
        with_training_splits({"vqa": {"train": Captions(str, "text_input", "answers"), "val": val}}, ["train", "val"])


def test_what_is_not_there_is_one_message(splits):
    with pytest.raises(UserError, match=r"run.train_splits names 'test', but the data sets have: train, val\."):
        with_training_splits(splits, ["train", "test"])
    with pytest.raises(UserError, match="no training split that says how samples are made"):
        with_training_splits({"own": {"val": splits["own"]["val"]}}, ["val"])
    with pytest.raises(UserError, match=r"names 'train', but the data sets have: val\."):
        with_training_splits({"own": {"val": splits["own"]["val"]}}, ["train"])
