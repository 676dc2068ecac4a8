"""LAVIS's blip_* start from an exported checkpoint of blip_mafa, and its own tasks train and score them through ``runner_mafa``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image

import lavis_downstream
import reduced
import reduced_blip
from lavis_mafa.cli.main import main

pytestmark = pytest.mark.slow

COLOURS = ["red", "green", "blue", "white", "black", "yellow"]
SPLITS = ("train", "val", "test")


def rows_of(make: Callable[[int, str], dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {split: [make(number, colour) for number, colour in enumerate(COLOURS)] for split in SPLITS}


def caption(number: int, colour: str) -> dict[str, Any]:
    return {"image": f"{number}.jpg", "caption": f"a {colour} square", "image_id": f"coco_{number}"}


def question(number: int, colour: str) -> dict[str, Any]:
    more = {"question_id": number, "question": "which colour is it", "dataset": "vqa"}
    return {"image": f"{number}.jpg", "answer": [colour] * 10, **more}


def statement(number: int, colour: str) -> dict[str, Any]:
    images = [f"images/train/0/{number}.jpg", f"images/train/0/{(number + 1) % 6}.jpg"]
    return {"sentence": f"the left one is {colour}", "label": str(number % 2 == 0), "images": images}


def sentence(number: int, colour: str) -> dict[str, Any]:
    return {"image": f"{number}", "sentence": f"it is {colour}", "label": ("entailment", "neutral", "contradiction")[number % 3]}


CLASSIFIES = {"task": "multimodal_classification"}
CAPTIONS = {"task": "captioning", "num_beams": 2, "max_len": 8, "min_len": 2, "report_metric": False, "evaluate": False}
# LAVIS's class at tiny size, its data, their rows, settings of its model and run, and what is scored
CASES: dict[str, tuple[Any, str, dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "blip_retrieval": (
        *(reduced_blip.lavis_retrieval, "coco_retrieval", rows_of(caption)),
        *({"queue_size": 8}, {"task": "retrieval", "k_test": 4}, "txt_r1"),
    ),
    "blip_vqa": (lavis_downstream.blip_vqa, "coco_vqa", rows_of(question), {}, {"task": "vqa", "num_ans_candidates": 3}, "agg_metrics"),
    "blip_nlvr": (lavis_downstream.blip_nlvr, "nlvr", rows_of(statement), {"num_classes": 2}, CLASSIFIES, "agg_metrics"),
    "blip_classification": (
        *(lavis_downstream.blip_classification, "snli_ve", rows_of(sentence)),
        *({"num_classes": 3}, CLASSIFIES, "agg_metrics"),
    ),
    "blip_caption": (reduced_blip.lavis_caption, "coco_caption", rows_of(caption), {}, CAPTIONS, "agg_metrics"),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    (folder / "images/train/0").mkdir(parents=True)
    for number, colour in enumerate(COLOURS):
        for place in (folder, folder / "images/train/0"):
            Image.new("RGB", (32, 32), colour).save(place / f"{number}.jpg")
    return folder


def annotations(data: str, rows: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Files in the form that LAVIS's builder of ``data`` reads."""
    content: dict[str, Any] = dict(rows)
    if data == "coco_retrieval":
        content |= {split: [{**row, "caption": [row["caption"]]} for row in rows[split]] for split in ("val", "test")}
    files = {split: [f"{folder}/{split}.json"] for split in rows}
    if data == "coco_vqa":
        asked = [{"question_id": number, "question": "which colour is it", "image_id": number} for number in range(len(COLOURS))]
        kinds = {"question_type": "which", "answer_type": "other"}
        answers = [{**asked[n], **kinds, "multiple_choice_answer": c, "answers": [{"answer": c}] * 10} for n, c in enumerate(COLOURS)]
        about = dict.fromkeys(("info", "task_type", "data_type", "data_subtype", "license"), "")
        content |= {"answers": COLOURS, "questions": {**about, "questions": asked}, "truth": {**about, "annotations": answers}}
        files["val"] += [f"{folder}/{name}.json" for name in ("answers", "questions", "truth")]
        files["test"] += [f"{folder}/answers.json"]
    for name, value in content.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return {split: {"url": paths, "storage": paths} for split, paths in files.items()}


@pytest.mark.parametrize("arch", CASES)
def test_lavis_trains_and_scores_its_blip_from_ours(arch, images, tmp_path, monkeypatch):
    build, data, rows, model, run, score = CASES[arch]
    monkeypatch.chdir(tmp_path)
    mine = reduced_blip.ours(3)
    torch.save({"model": mine.state_dict()}, "ours.pth")
    more = ["--queue-size", "8"] if arch == "blip_retrieval" else []
    assert main(["export", "ours.pth", "--for", arch, "--output", "theirs.pth", *more]) == 0
    built = []

    def from_config(cfg: Any) -> Any:
        theirs = build()
        theirs.load_from_pretrained(cfg.pretrained)
        built.append(torch.equal(theirs.visual_encoder.cls_token, mine.visual_encoder.cls_token))
        return theirs

    tiny = type(arch, (registry.get_model_class(arch),), {"from_config": staticmethod(from_config)})
    monkeypatch.setitem(registry.mapping["model_name_mapping"], arch, tiny)
    kind = next(iter(tiny.PRETRAINED_MODEL_CONFIG_DICT))
    vis = {split: {"name": f"blip_image_{split}", "image_size": reduced.SIZE} for split in ("train", "eval")}
    text = {split: {"name": "blip_question" if data == "coco_vqa" else "blip_caption"} for split in ("train", "eval")}
    info = {"annotations": annotations(data, rows, tmp_path), "images": {"storage": str(images)}}
    config = {
        "model": {"arch": arch, "model_type": kind, "load_finetuned": False, "pretrained": "theirs.pth", **model},
        "datasets": {data: {"build_info": info, "vis_processor": vis, "text_processor": text}},
        "run": {
            **{"runner": "runner_mafa", "device": "cpu", "max_epoch": 1, "batch_size_train": 2, "batch_size_eval": 3, "num_workers": 0},
            **{"log_freq": 1, "train_splits": ["train"], "valid_splits": ["val"], "init_lr": 1e-4, "warmup_steps": 0, **run},
        },
    }
    OmegaConf.save(OmegaConf.create(config), "run.yaml")
    command = "evaluate" if arch == "blip_classification" else "train"
    assert main([command, "--cfg-path", "run.yaml"]) == 0 and built == [True]
    (folder,) = [path.parent for path in tmp_path.rglob("evaluation.jsonl")]
    result = json.loads((folder / "evaluation.jsonl").read_text().splitlines()[-1])
    assert 0 <= result[score] <= 100
    if command == "train":
        losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert len(losses) == 3 and all(0 < loss < 100 for loss in losses)


@pytest.mark.parametrize(("taught", "error"), [(True, TypeError), (False, UnboundLocalError)])
def test_lavis_blip_classification_trains_in_no_way(taught, error):
    model = lavis_downstream.blip_classification()
    model.use_distill = taught
    with pytest.raises(error):
        model.train()({**reduced.batch(3), "label": torch.tensor([0, 1, 2]), "epoch": 0, "iters": 0, "num_iters_per_epoch": 1})
