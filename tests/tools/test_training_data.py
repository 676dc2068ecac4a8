"""The data of a YAML, opened for tools: which files, which rows, from wherever relative paths start."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from lavis_mafa.errors import UserError
from lavis_mafa.tools.training_data import annotated, read_annotated, split_files


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Blocks of data below a folder that is not the working directory."""
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "there"
    (there / "images").mkdir(parents=True)
    rows = [{"image": f"{i}.jpg", "caption": [f"a dog {i}"], "concept": "dog", "image_id": i} for i in range(4)]
    (there / "train.json").write_text(json.dumps(rows))
    (there / "val.jsonl").write_text(json.dumps(rows[0]) + "\n")
    cache = there / ".lavis_cache" / "coco"
    cache.mkdir(parents=True)
    (cache / "train.json").write_text(json.dumps([{"image": "1.jpg", "caption": "a cat", "image_id": "1"}]))
    annotations = {"train": {"storage": ["train.json"]}, "val": {"storage": {"annotations": "val.jsonl", "images": "images"}}}
    pairs = {"build_info": {"annotations": annotations, "images": {"storage": "images"}, "max_images": 3}}
    coco = {
        "build_info": {"annotations": {"train": {"storage": "coco/train.json"}}, "images": {"storage": "coco"}},
        "data_type": "images",
    }
    processors = {"train": {"name": "blip_caption"}, "eval": {"name": "blip_caption"}}
    return SimpleNamespace(base=there, pairs=OmegaConf.create(pairs), coco=OmegaConf.create({**coco, "text_processor": processors}))


def test_own_files_start_from_where_the_run_did(job):
    train = split_files("grit_pairs", job.pairs, "train", job.base)
    assert [f.path for f in train.files] == [job.base / "train.json"] and train.root == job.base / "images"
    assert not train.allow_absolute_paths and split_files("grit_pairs", job.pairs, "test", job.base) is None
    (val,) = split_files("grit_pairs", job.pairs, "val", job.base).files
    assert (val.path, val.images) == (job.base / "val.jsonl", job.base / "images")
    assert [str(f.path) for f in split_files("grit_pairs", job.pairs, "train").files] == ["train.json"], "as it was written"
    rows = read_annotated("grit_pairs", job.pairs, job.base)
    assert rows.table["image"].to_pylist() == ["0.jpg", "1.jpg", "2.jpg"] and rows.root == job.base / "images"
    assert rows.truth.concept_id("dog") == 0


def test_lavis_files_start_from_its_cache(job):
    train = split_files("coco_caption", job.coco, "train", job.base)
    cache = job.base / ".lavis_cache" / "coco"
    assert [f.path for f in train.files] == [cache / "train.json"] and train.root == cache and train.allow_absolute_paths
    rows = read_annotated("coco_caption", job.coco, job.base)
    assert rows.table.to_pylist() == [{"image": "1.jpg", "caption": ["a cat"]}] and rows.root == cache and rows.truth is None
    with pytest.raises(UserError, match="datasets.nowhere is not registered"):
        read_annotated("nowhere", job.coco, job.base)
    del job.coco.build_info.annotations.train
    assert read_annotated("coco_caption", job.coco, job.base) is None


@pytest.mark.parametrize("captions", ["fixed", "drawn"])
def test_the_rows_are_those_of_the_built_data_set(emoji, captions):
    from lavis_mafa.datasets.builders import GritEmojiBuilder

    text, image = ({m: {"name": name} for m in ("train", "eval")} for name in ("albef_caption", "albef_image_eval"))
    info = {"root": str(emoji), "captions": captions, "max_concepts": 20}
    block = OmegaConf.create({"build_info": info, "data_type": "images", "text_processor": text, "vis_processor": image})
    built, read = annotated(GritEmojiBuilder(block).build()["train"]), read_annotated("grit_emoji", block)
    assert read.table.equals(built.table) and (read.root, len(read)) == (built.root, len(built))
    assert split_files("grit_emoji", block, "val").files[0].path == emoji / "seen.jsonl"


def test_data_without_captions_are_refused():
    lavis = SimpleNamespace(annotation=[{"image": "1.jpg", "caption": "a"}, {"image": "2.jpg", "caption": ["b"]}], vis_root="images")
    assert annotated(lavis).table["caption"].to_pylist() == [["a"], ["b"]]
    lavis.annotation = [{"question": "a"}] * 2
    with pytest.raises(UserError, match="keeps no list of images and captions"):
        annotated(lavis)


@pytest.mark.parametrize("captions", ["web", "curated"])
def test_the_rows_of_scenes_are_those_of_the_built_data_set(tmp_path_factory, captions):
    from lavis_mafa.datasets.builders import GritScenesBuilder
    from lavis_mafa.datasets.scenes.build import build_scenes

    root = tmp_path_factory.mktemp("data") / "scenes"
    build_scenes(root, train=12, test=3, progress=False)
    text, image = ({m: {"name": name} for m in ("train", "eval")} for name in ("albef_caption", "albef_image_eval"))
    info = {"root": str(root), "captions": captions, "max_images": 5}
    block = OmegaConf.create({"build_info": info, "data_type": "images", "text_processor": text, "vis_processor": image})
    built, read = GritScenesBuilder(block).build(), read_annotated("grit_scenes", block)
    assert read.table.equals(built["train"].table) and (read.root, len(read)) == (root, 5)
    pairs = torch.arange(5).repeat(2), torch.arange(5).repeat_interleave(2)
    keys = torch.tensor([read.truth.text_key(captions[0]) for captions in read.table["caption"].to_pylist()])
    match = built["train"].truth.matches(built["train"].concepts[pairs[0]], keys[pairs[1]])
    assert read.truth.matches(read.truth.images(read.table)[pairs[0]], keys[pairs[1]]).equal(match)
    for split in ("val", "test", "unseen"):
        (file,) = split_files("grit_scenes", block, split).files
        assert [str(file)] == built[split].files.split(", ")
    assert split_files("grit_scenes", block, "other") is None
    block.build_info.root = "nowhere"
    with pytest.raises(UserError, match="nowhere holds no scenes; build them once with"):
        read_annotated("grit_scenes", block)
