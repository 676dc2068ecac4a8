"""Visual entailment by commands: trained, resumed, evaluated, and what is wrong with its data in one message."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from lavis_mafa.cli.main import main
from lavis_mafa.config.check import _labels, check_lavis
from lavis_mafa.errors import UserError
from outputs import assert_same_weights

LABELS = {"red": "entailment", "blue": "contradiction", "grey": "neutral"}
YAML = """
model:
  arch: albef_ve_mafa
  model_type: tiny
  image_encoder: {image_size: 16, patch_size: 8, width: 16, depth: 1, heads: 1}
  text_encoder: {width: 16, layers: 2, fusion_layer: 1, heads: 1}
  momentum_distillation: {momentum: 0.9}
datasets:
  grit_entailment:
    build_info:
      annotations:
        train: {storage: DATA/train.jsonl}
        val: {storage: DATA/val.csv}
      images: {storage: DATA}
    vis_processor:
      train: {name: albef_image_train, image_size: 16, randaugment: null}
      eval: {name: albef_image_eval, image_size: 16}
run:
  task: mafa_classification
  init_lr: 1.0e-3
  max_epoch: 2
  batch_size_train: 3
  batch_size_eval: 2
  warmup_steps: 0
  num_workers: 0
  log_freq: 1
  valid_splits: [val]
  test_splits: [val]
  device: cpu
"""


def rows(count: int) -> list[dict[str, str]]:
    return [
        {"image": f"{colour}.png", "sentence": "it is red", "label": label, "sentence_id": f"{number}-{colour}"}
        for number in range(count)
        for colour, label in LABELS.items()
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for colour in LABELS:
        Image.new("RGB", (16, 16), colour).save(folder / f"{colour}.png")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(5)))
    lines = [",".join(row.values()) for row in rows(1)]
    (folder / "val.csv").write_text("\n".join(["image,caption,label,sentence_id", *lines]))
    (folder / "run.yaml").write_text(YAML.replace("DATA", str(folder)))
    return folder


@pytest.fixture(scope="module")
def run(data) -> Callable[..., Path]:
    """Train, or evaluate, without an error; the folder of the run."""

    def command(name: str, folder: str, *options: str) -> Path:
        output = data / folder
        arguments = ["--cfg-path", str(data / "run.yaml"), "--options", f"run.output_dir={output}", *options]
        assert main([name, *arguments]) == 0
        return max(output.glob("2*"))

    return command


@pytest.fixture(scope="module")
def whole(run) -> Path:
    return run("train", "whole")


def results(folder: Path) -> list[dict[str, str]]:
    return json.loads((folder / "result/val_classification_result.json").read_text())


def test_a_resumed_training_is_the_whole_one(run, whole):
    """Stopped within an epoch, with a teacher and the best epoch on val."""
    stopped = run("train", "parts", "run.max_steps=7")
    resumed = run("train", "parts", f"run.resume_ckpt_path={stopped / 'checkpoint_1_2.pth'}")
    for name in ("checkpoint_1.pth", "checkpoint_best.pth"):
        assert_same_weights(whole / name, resumed / name)
    assert results(resumed) == results(whole)


def test_evaluating_a_checkpoint_gives_the_runs_figures(run, whole):
    options = [f"model.pretrained={whole / 'checkpoint_best.pth'}", "model.momentum_distillation=null", "run.valid_splits=[]"]
    evaluated = run("evaluate", "evaluated", *options)
    of_run = [json.loads(line) for line in (whole / "evaluation.jsonl").read_text().splitlines()][-1]
    (alone,) = [json.loads(line) for line in (evaluated / "evaluation.jsonl").read_text().splitlines()]
    told = results(evaluated)
    assert [row["sentence_id"] for row in told] == [row["sentence_id"] for row in rows(1)]
    assert [row["true_label"] for row in told] == list(LABELS.values()) and told == results(whole)
    right = [row["label"] == row["true_label"] for row in told]
    assert alone["accuracy"] == of_run["accuracy"] == pytest.approx(100 * sum(right) / 3)
    assert {label: alone[f"accuracy_{label}"] for label in LABELS.values()} == {
        row["true_label"]: 100 * hit for row, hit in zip(told, right, strict=True)
    }


def test_lavis_snli_ve_is_trained_and_scored(data, whole, refused):
    """Its layout: images named without .jpg; results go by the rows' numbers."""
    for number, colour in enumerate(LABELS):
        Image.new("RGB", (16, 16), colour).save(data / f"{number}.jpg")
    content = [{"image": str(n), "sentence": "it is red", "label": label} for n, label in enumerate(LABELS.values())]
    (data / "ve.json").write_text(json.dumps(content))
    file = {"url": str(data / "ve.json"), "storage": str(data / "ve.json")}
    info = {"annotations": {split: file for split in ("train", "val", "test")}, "images": {"storage": str(data)}}
    size = "image_size: 16"
    text = YAML[: YAML.index("datasets:")] + f"datasets:\n  snli_ve:\n    build_info: {json.dumps(info)}\n"
    text += f"    vis_processor: {{train: {{name: albef_image_train, {size}}}, eval: {{name: albef_image_eval, {size}}}}}\n"
    text += "    text_processor: {train: {name: albef_caption}, eval: {name: albef_caption}}\n" + YAML[YAML.index("run:") :]
    (data / "snli_ve.yaml").write_text(text)
    options = [f"run.output_dir={data / 'snli_ve'}", "run.max_epoch=1", f"model.pretrained={whole / 'checkpoint_best.pth'}"]
    assert main(["train", "--cfg-path", str(data / "snli_ve.yaml"), "--options", *options]) == 0
    told = results(next((data / "snli_ve").glob("2*")))
    assert [row["sentence_id"] for row in told] == [0, 1, 2] and [row["true_label"] for row in told] == list(LABELS.values())
    assert main(["check-data", "--cfg-path", str(data / "snli_ve.yaml"), "--output", str(data / "checked")]) == 0
    content[1]["label"] = "-"
    (data / "ve.json").write_text(json.dumps(content))
    said = "row 2 of its annotations: label is '-'; allowed: contradiction, neutral, entailment."
    assert said in refused("train", "--cfg-path", data / "snli_ve.yaml")


WRONG = [
    (
        "train.jsonl",
        '{"image": "red.png", "sentence": "a", "label": "maybe"}',
        "row 1: label is 'maybe'; allowed: contradiction, neutral, entailment",
    ),
    ("train.jsonl", '{"image": "red.png", "sentence": "a", "label": ""}', "row 1: 'label' is empty; allowed: contradiction, "),
    ("train.jsonl", '{"image": "red.png", "sentence": "a"}', "no column 'label'; its columns are image, sentence."),
    ("train.jsonl", '{"image": "red.png", "text": "a", "label": "neutral"}', "no column 'sentence'"),
    ("train.jsonl", '{"image": "red.png", "sentence": ["a", "b"], "label": "neutral"}', "there are several sentences"),
    (
        "train.jsonl",
        '{"image": "red.png", "caption": null, "label": "neutral"}',
        "the sentence is empty or null; allowed: one text a row.",
    ),
    ("train.jsonl", '{"image": "none.png", "sentence": "a", "label": "neutral"}', "row 1: no image at "),
    ("val.csv", "image,sentence,label\nred.png,nan,neutral", "the sentence 'nan' is how a missing sentence is written"),
    (
        "val.csv",
        "image,sentence,label\nred.png,a,neutral\nred.png,...,neutral",
        "row 2: The caption '...' holds no word. Evaluation replaces",
    ),
    ("val.csv", "image,sentence,label,sentence_id\nred.png,a,neutral,1\nred.png,b,neutral,1", "sentence_id 1 is there twice"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_wrong_data_are_one_message(name, content, message, data, tmp_path, refused):
    for file in data.glob("*.*"):
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_text(content)
    (tmp_path / "run.yaml").write_text(YAML.replace("DATA", str(tmp_path)))
    assert message in (said := refused("train", "--cfg-path", tmp_path / "run.yaml")) and name in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run.task=mafa_pretrain"], "run.task is mafa_pretrain, but model.arch is albef_ve_mafa; allowed here: run.task: mafa_class"),
        (["run.grit.enabled=true"], "run.grit.enabled is true, but mafa_classification has no use for it"),
        (["model.use_distill=false"], "Here it is model.itc.momentum_distillation, downstream model.momentum_distillation"),
        (["model.pretrained=FILE"], "model.pretrained: FILE is a BLIP checkpoint, but albef_ve_mafa needs an ALBEF checkpoint here"),
    ],
)
def test_what_does_not_go_together(options, message, data, tmp_path, refused_early):
    file = str(tmp_path / "blip.pth")
    torch.save({"text_encoder.encoder.layer.0.crossattention.self.query.weight": torch.zeros(1)}, file)
    options = [option.replace("FILE", file) for option in options]
    assert message.replace("FILE", file) in refused_early("train", "--cfg-path", data / "run.yaml", "--options", *options)


@pytest.mark.parametrize(
    ("task", "arch", "datasets", "message"),
    [
        ("mafa_classification", "albef_classification", ["grit_entailment", "snli_ve"], ""),
        ("multimodal_classification", "albef_classification", ["snli_ve"], ""),
        ("mafa_pretrain", "albef_mafa", ["grit_pairs"], ""),
        ("mafa_pretrain", "albef_mafa", ["grit_pairs", "snli_ve"], "snli_ve has sentences that may be false"),
        ("multimodal_classification", "albef_classification", ["grit_entailment"], "allowed here: mafa_classification"),
        ("mafa_classification", "albef_ve_mafa", ["grit_pairs"], "grit_pairs has no sentences with labels"),
        (
            "mafa_classification",
            "albef_nlvr",
            ["snli_ve"],
            "is albef_nlvr; allowed here: albef_ve_mafa, albef_classification, ",
        ),
    ],
)
def test_labels_are_for_their_task_alone(task, arch, datasets, message):
    """A sentence that contradicts its image is no positive of pre-training."""
    said = list(_labels(task, arch, dict.fromkeys(datasets)))
    assert len(said) == bool(message) and all(message in one for one in said)


def test_laviss_own_script_is_told_so_too():
    model = {"arch": "albef_mafa", "model_type": "tiny", "ecm": {"enabled": False}, "itc": {"smoothing": 0.0}}
    run = {"task": "mafa_pretrain", "device": "cpu", "grit": {"enabled": False}}
    for name, refused in (("coco_caption", nullcontext()), ("snli_ve", pytest.raises(UserError, match="sentences that may be false"))):
        with refused:
            check_lavis(OmegaConf.create({"model": model, "run": run, "datasets": {name: {}}}))


def test_what_other_commands_say(data, refused, tmp_path):
    assert main(["validate", str(data / "run.yaml")]) == 0
    assert main(["check-data", "--cfg-path", str(data / "run.yaml"), "--output", str(tmp_path)]) == 0
    checked = json.loads((next(tmp_path.rglob("check.json"))).read_text())
    assert checked["rows"] == 18, checked
    (tmp_path / "val.jsonl").write_text(
        "".join(json.dumps({**row, "label": label}) + "\n" for row, label in zip(rows(1), "abc", strict=False))
    )
    options = [f"datasets.grit_entailment.build_info.annotations.val.storage={tmp_path / 'val.jsonl'}"]
    command = ["check-data", "--cfg-path", str(data / "run.yaml"), "--output", str(tmp_path / "wrong"), "--options", *options]
    assert main(command) == 1
    found = json.loads((tmp_path / "wrong/check.json").read_text())["kinds"]["unknown_label"]
    assert found["rows"] == 3 and "'a' is none of contradiction, neutral, entailment" in found["examples"][0]["reason"]
