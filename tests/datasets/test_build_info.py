"""What ``build_info`` names: files, folders, patterns, images of their own, and which rows are kept."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from lavis.common.registry import registry
from lavis.datasets.builders import load_dataset  # noqa: F401 - fills the registry
from omegaconf import OmegaConf
from PIL import Image

from lavis_mafa.config.data import check_block
from lavis_mafa.datasets.builders import GritPairsBuilder, GritVqaBuilder
from lavis_mafa.datasets.indexed import IndexedDataset
from lavis_mafa.errors import UserError
from lavis_mafa.runners.job import _check_lavis_blocks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``one`` and ``two``: images of the same names and different colours, with rows; ``shards``: three files."""
    for name, colour in (("one", "red"), ("two", "blue")):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("RGB", (8, 8), colour).save(tmp_path / name / f"{number}.png")
        rows = [{"image": f"{number}.png", "caption": f"{name} {number}", "image_id": number} for number in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "shards").mkdir()
    for number in (2, 0, 1):
        (tmp_path / f"shards/{number}.csv").write_text(f"image,caption\n{number}.png,shard {number}\n")
    (tmp_path / "shards/_SUCCESS").touch()
    return tmp_path


def build(folder: Path, storage: Any, builder: Any = GritPairsBuilder, split: str = "train", **more: Any) -> Any:
    default = next(iter(OmegaConf.load(builder.default_config_path()).datasets.values()))
    info = {"annotations": {split: {"storage": storage}}, "images": {"storage": str(folder / "one")}, **more}
    processors = {part: {mode: {"name": name} for mode in ("train", "eval")} for part, name in PROCESSORS.items()}
    return builder(OmegaConf.merge(default, {"build_info": info, **processors})).build_datasets()[split]


PROCESSORS = {"vis_processor": "albef_image_eval", "text_processor": "albef_caption"}


def written(data: Any) -> list[str]:
    return [data.captions(row)[0] for row in range(len(data))]


def test_folders_and_patterns_are_their_files_in_order(folder: Path) -> None:
    for storage in (f"{folder}/shards", f"{folder}/shards/*.csv", [f"{folder}/shards/[0-1].csv", f"{folder}/**/2.csv"]):
        assert written(build(folder, storage)) == ["shard 0", "shard 1", "shard 2"]
    (folder / "shards/x[1].csv").write_text("image,caption\n3.png,odd name\n")
    assert written(build(folder, f"{folder}/shards/x[1].csv")) == ["odd name"]
    for storage, message in (
        (f"{folder}/shards/*.parquet", "annotations.train.storage: no file matches '.*parquet'"),
        (f"{folder}/one", "the folder .*one holds no annotation file"),
    ):
        with pytest.raises(UserError, match=message):
            build(folder, storage)
    (folder / "shards/a.jsonl").touch()
    with pytest.raises(UserError, match="holds .csv and .jsonl files; name one kind"):
        build(folder, f"{folder}/shards")


@pytest.mark.parametrize("split", ["train", "val"])
def test_files_may_have_an_image_folder_of_their_own(folder: Path, split: str) -> None:
    own = {"annotations": f"{folder}/two.jsonl", "images": f"{folder}/two"}
    data = build(folder, [f"{folder}/one.jsonl", own], split=split)
    assert len(data) == 8  # the same names and ids are other images
    colours = [Image.open(data.image_path(row) if split == "train" else data.image[row]).getpixel((0, 0)) for row in range(8)]
    assert colours == [(255, 0, 0)] * 4 + [(0, 0, 255)] * 4
    if split == "train":
        assert data.image_keys.tolist() == list(range(8))
    with pytest.raises(UserError, match="The image folder .*nowhere does not exist"):
        build(folder, [{**own, "images": f"{folder}/nowhere"}])
    (folder / "two.jsonl").write_text('{"image": "../one/0.png", "caption": "a"}\n')
    with pytest.raises(UserError, match="two.jsonl, row 1: image is '../one/0.png'; allowed: a path below"):
        build(folder, [own])


def test_max_images_are_the_first_or_drawn_by_a_seed(folder: Path) -> None:
    rows = [{"image": f"{number % 4}.png", "caption": f"text {number}"} for number in range(200)]
    (folder / "many.json").write_text(json.dumps(rows))

    def kept(**more: Any) -> list[int]:
        return [int(text.split()[1]) for text in written(build(folder, f"{folder}/many.json", **more))]

    assert kept(max_images=20) == list(range(20))
    drawn = kept(max_images=20, max_images_seed=3)
    assert drawn == sorted(set(drawn)) and len(drawn) == 20 and max(drawn) > 100
    assert kept(max_images=20, max_images_seed=3) == drawn != kept(max_images=20, max_images_seed=4)
    assert kept(max_images=500, max_images_seed=3) == list(range(200))


def test_questions_of_random_rows_keep_their_ids(folder: Path) -> None:
    rows = [{"image": "0.png", "question": f"{n}?", "answer": "x", "question_id": f"0{n}"} for n in range(50)]
    (folder / "q.json").write_text(json.dumps(rows))
    data = build(folder, f"{folder}/q.json", GritVqaBuilder, "test", max_images=5, max_images_seed=0)
    assert data.question_ids == [f"0{question.strip('?')}" for question in data.questions] and len(data) == 5


def test_data_sets_can_be_sent_to_a_worker_that_was_spawned(folder: Path) -> None:
    data = build(folder, f"{folder}/one.jsonl")
    sent = pickle.loads(pickle.dumps(data))
    assert sent[2]["text_input"] == data[2]["text_input"] and IndexedDataset(sent).image_keys.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("sub\\0.png", r"no image at .*; the path holds a backslash; there is .*one/sub/0.png"),
        ("0.png ", "the path holds a blank at its end; there is .*one/0.png"),
        ("https://a.org/0.png", "it is an address; download the images first"),
        ("none.png", "is .*one the folder the paths start from"),
    ],
)
def test_a_path_without_an_image_says_what_is_odd(folder: Path, image: str, message: str) -> None:
    (folder / "one/sub").mkdir()
    (folder / "one/0.png").rename(folder / "one/sub/0.png")
    Image.new("RGB", (8, 8)).save(folder / "one/0.png")
    (folder / "a.json").write_text(json.dumps([{"image": image, "caption": "a dog"}]))
    with pytest.raises(UserError, match=message):
        build(folder, f"{folder}/a.json")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"vis_procesor": {}}, "datasets.coco_caption.vis_procesor is not a key.*Did you mean 'vis_processor'"),
        ({"text_processor": {"trian": {}}}, "text_processor.trian is not a key; allowed: train, eval. Did you mean 'train'"),
        ({"build_info": {"image": {"storage": "x"}}}, "build_info.image is not a key.*Did you mean 'images'"),
        ({"build_info": {"annotations": {"val": {"storgae": "x"}}}}, "annotations.val.storgae is not a key.*Did you mean 'storage'"),
        ({"build_info": {"max_images": 3}}, "build_info.max_images is not a key; allowed: annotations, images"),
        ({"type": "defualt"}, "datasets.coco_caption.type is 'defualt'; allowed: default. Did you mean 'default'"),
    ],
)
def test_unknown_keys_of_a_data_set_of_lavis(block: dict[str, Any], message: str) -> None:
    config = OmegaConf.create({"coco_caption": {"build_info": {"annotations": {"train": {"url": "a", "storage": "b"}}}, **block}})
    with pytest.raises(UserError, match=message):
        check_block("coco_caption", config.coco_caption)
        _check_lavis_blocks(config, registry)
    right = OmegaConf.create({"coco_vqa": {"type": "eval", "build_info": {"images": {"storage": "x"}}, "vis_processor": {"eval": {}}}})
    check_block("coco_vqa", right.coco_vqa)
    _check_lavis_blocks(right, registry)
