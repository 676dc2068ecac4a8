"""Statements about two images by commands: text assignment, fine-tuning from it, resumed, evaluated; LAVIS's layout; wrong data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from lavis_mafa.cli.main import main
from lavis_mafa.config.check import _labels
from outputs import assert_same_weights

COLOURS = ("red", "blue", "grey")
YAML = """
model:
  arch: albef_nlvr_mafa
  model_type: tiny
  image_encoder: {image_size: 16, patch_size: 8, width: 16, depth: 1, heads: 1}
  text_encoder: {width: 16, layers: 2, fusion_layer: 1, heads: 1}
  momentum_distillation: {momentum: 0.9}
datasets:
  grit_statements:
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
ASSIGN = YAML.replace("albef_nlvr_mafa", "albef_ta_mafa").replace("  momentum_distillation: {momentum: 0.9}", "  embed_dim: 8")
ASSIGN = (
    ASSIGN.replace("grit_statements", "grit_pairs")
    .replace("train.jsonl", "pairs.jsonl")
    .replace("mafa_classification", "mafa_pretrain")
)
ASSIGN = "".join(line for line in ASSIGN.splitlines(keepends=True) if "val" not in line) + "  grit: {enabled: false}\n"


def rows(count: int) -> list[dict[str, str]]:
    """Whether both are of one colour."""
    pairs = [(one, other) for one in COLOURS for other in (one, COLOURS[0])]
    return [
        {
            "image0": f"{one}.png",
            "image1": f"{other}.png",
            "sentence": "they are equal",
            "label": str(one == other),
            "sentence_id": f"{n}-{k}",
        }
        for n in range(count)
        for k, (one, other) in enumerate(pairs)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for colour in COLOURS:
        Image.new("RGB", (16, 16), colour).save(folder / f"{colour}.png")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(2)))
    (folder / "val.csv").write_text("\n".join(",".join(line) for line in [[*rows(1)[0]], *(row.values() for row in rows(1))]))
    pairs = [{"image": f"{colour}.png", "caption": f"it is {colour}"} for colour in COLOURS * 4]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    for name, text in (("run", YAML), ("assign", ASSIGN)):
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(folder)))
    return folder


@pytest.fixture(scope="module")
def run(data) -> Callable[..., Path]:
    """Train, or evaluate, without an error; the folder of the run."""

    def command(name: str, folder: str, *options: str, yaml: str = "run") -> Path:
        output = data / folder
        arguments = ["--cfg-path", str(data / f"{yaml}.yaml"), "--options", f"run.output_dir={output}", *options]
        assert main([name, *arguments]) == 0
        return max(output.glob("2*"))

    return command


@pytest.fixture(scope="module")
def assigned(run) -> Path:
    """A checkpoint of text assignment."""
    return run("train", "assigned", yaml="assign") / "checkpoint_1.pth"


@pytest.fixture(scope="module")
def whole(run, assigned) -> Path:
    return run("train", "whole", f"model.pretrained={assigned}")


def results(folder: Path) -> list[dict[str, str]]:
    return json.loads((folder / "result/val_classification_result.json").read_text())


def test_text_assignment_is_trained_and_resumed(run, assigned):
    (record, *_) = [json.loads(line) for line in (assigned.parent / "metrics.jsonl").read_text().splitlines()]
    assert record["loss"] > 0 and 0 <= record["ta_accuracy"] <= 1
    stopped = run("train", "assigned_parts", "run.max_steps=6", yaml="assign")
    resumed = run("train", "assigned_parts", f"run.resume_ckpt_path={stopped / 'checkpoint_1_2.pth'}", yaml="assign")
    assert_same_weights(assigned, resumed / "checkpoint_1.pth")


def test_a_resumed_training_is_the_whole_one(run, whole, assigned):
    """Stopped within an epoch, with a teacher and the best epoch on val; keys and values of a couple are still one."""
    stopped = run("train", "parts", f"model.pretrained={assigned}", "run.max_steps=6")
    resumed = run("train", "parts", f"model.pretrained={assigned}", f"run.resume_ckpt_path={stopped / 'checkpoint_1_2.pth'}")
    for name in ("checkpoint_1.pth", "checkpoint_best.pth"):
        assert_same_weights(whole / name, resumed / name)
    assert results(resumed) == results(whole)
    state = torch.load(resumed / "checkpoint_1.pth", weights_only=True)["model"]
    for part in ("text_encoder", "text_encoder_m"):
        key = f"{part}.encoder.layer.{{}}.crossattention.self.key.weight"
        assert torch.equal(state[key.format(1)], state[key.format(2)])


def test_evaluating_a_checkpoint_gives_the_runs_figures(run, whole):
    options = [f"model.pretrained={whole / 'checkpoint_best.pth'}", "model.momentum_distillation=null", "run.valid_splits=[]"]
    evaluated = run("evaluate", "evaluated", *options)
    of_run = [json.loads(line) for line in (whole / "evaluation.jsonl").read_text().splitlines()][-1]
    (alone,) = [json.loads(line) for line in (evaluated / "evaluation.jsonl").read_text().splitlines()]
    told = results(evaluated)
    assert told == results(whole) and [row["sentence_id"] for row in told] == [row["sentence_id"] for row in rows(1)]
    assert [row["true_label"] for row in told] == [row["label"] for row in rows(1)]
    right = [row["label"] == row["true_label"] for row in told]
    assert alone["accuracy"] == of_run["accuracy"] == pytest.approx(100 * sum(right) / 6)
    for label in ("False", "True"):
        own = [hit for row, hit in zip(told, right, strict=True) if row["true_label"] == label]
        assert alone[f"accuracy_{label}"] == pytest.approx(100 * sum(own) / len(own))


def lavis_yaml(data: Path) -> str:
    """LAVIS's builder on its layout: two paths, and the label as a text."""
    told = [{"images": [row["image0"], row["image1"]], "sentence": row["sentence"], "label": row["label"]} for row in rows(1)]
    (data / "nlvr.json").write_text(json.dumps(told))
    file = {"url": str(data / "nlvr.json"), "storage": str(data / "nlvr.json")}
    info = {"annotations": {split: file for split in ("train", "val", "test")}, "images": {"storage": str(data)}}
    text = YAML[: YAML.index("datasets:")] + f"datasets:\n  nlvr:\n    build_info: {json.dumps(info)}\n"
    size = "image_size: 16"
    text += f"    vis_processor: {{train: {{name: albef_image_train, {size}}}, eval: {{name: albef_image_eval, {size}}}}}\n"
    return text + "    text_processor: {train: {name: albef_caption}, eval: {name: albef_caption}}\n" + YAML[YAML.index("run:") :]


def test_lavis_nlvr_is_trained_and_scored(data, run, whole, refused):
    (data / "nlvr.yaml").write_text(lavis_yaml(data))
    tuned = run("train", "nlvr", "run.max_epoch=1", f"model.pretrained={whole / 'checkpoint_best.pth'}", yaml="nlvr")
    told = results(tuned)
    assert [row["sentence_id"] for row in told] == list(range(6))
    assert [row["true_label"] for row in told] == [row["label"] for row in rows(1)]
    content = json.loads((data / "nlvr.json").read_text())
    for wrong, said in (
        ({"label": "-"}, "row 2 of its annotations: label is '-'; allowed: False, True."),
        ({"images": ["red.png"]}, "row 2 of its annotations: images is ['red.png']; allowed: a list of two paths."),
        ({"images": None}, "row 2 of its annotations: images is missing; allowed: a list of texts."),
    ):
        (data / "nlvr.json").write_text(json.dumps([content[0], {**content[1], **wrong}]))
        assert said in refused("train", "--cfg-path", data / "nlvr.yaml")
    shutil.copy(data / "red.png", data / "torn.png")
    (data / "torn.png").write_bytes((data / "torn.png").read_bytes()[:50])
    (data / "nlvr.json").write_text(json.dumps([{**content[0], "images": ["red.png", "torn.png"]}, *content[1:]]))
    assert "red.png and " in (said := refused("train", "--cfg-path", data / "nlvr.yaml")) and "torn.png" in said


WRONG = [
    (
        "train.jsonl",
        '{"images": ["red.png"], "sentence": "a", "label": true}',
        "row 1: 'images' is [\"red.png\"]; allowed: a list of two",
    ),
    ("train.jsonl", '{"images": ["red.png", "no.png"], "sentence": "a", "label": true}', "row 1: no image at "),
    ("val.csv", "image0,image1,sentence,label\nred.png,blue.png,a,perhaps", "row 1: label is 'perhaps'; allowed: False, True."),
    ("val.csv", "image0,image1,sentence,label\nred.png,,a,true", "row 1: 'image1' is empty; allowed: a path."),
    (
        "val.csv",
        "image0,image1,sentence,label\nred.png,blue.png,...,true",
        "row 1: The caption '...' holds no word. Evaluation replaces",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_wrong_data_are_one_message(name, content, message, data, tmp_path, refused):
    for file in (*(f"{colour}.png" for colour in COLOURS), "train.jsonl", "val.csv"):
        (tmp_path / file).write_bytes((data / file).read_bytes())
    (tmp_path / name).write_text(content)
    (tmp_path / "run.yaml").write_text(YAML.replace("DATA", str(tmp_path)))
    assert message in (said := refused("train", "--cfg-path", tmp_path / "run.yaml")) and name in said


@pytest.mark.parametrize(
    ("yaml", "options", "message"),
    [
        ("run", ["run.task=mafa_pretrain"], "model.arch is albef_nlvr_mafa; allowed here: run.task: mafa_classification"),
        (
            "assign",
            ["run.task=mafa_classification"],
            "model.arch is albef_ta_mafa; allowed here: model.arch: albef_ve_mafa or albef_nlvr_mafa",
        ),
        ("assign", ["run.grit.enabled=true"], "albef_ta_mafa makes no features of texts to group by; allowed here: false."),
        ("assign", ["run.valid_splits=[val]"], "albef_ta_mafa is for training alone; leave run.valid_splits and run.test_splits empty"),
        ("assign", ["run.batch_size_train=2"], "text assignment draws two other images for each text; allowed: 3 or more."),
        ("assign", ["model.momentum_distillation={momentum: 0.9}"], "model.momentum_distillation is not a setting"),
    ],
)
def test_what_does_not_go_together(yaml, options, message, data, refused_early):
    assert message in refused_early("train", "--cfg-path", data / f"{yaml}.yaml", "--options", *options)


def test_a_checkpoint_of_two_images_is_named_where_one_is_read(data, assigned, capsys):
    options = ["model.arch=albef_ve_mafa", f"model.pretrained={assigned}"]
    assert main(["validate", str(data / "run.yaml"), "--options", *options]) == 2
    assert f"{assigned} has 3 text layers of a model of two images (albef_nlvr_mafa, albef_ta_mafa)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "arch", "datasets", "message"),
    [
        ("mafa_classification", "albef_nlvr_mafa", ["grit_statements", "nlvr"], ""),
        ("multimodal_classification", "albef_nlvr_mafa", ["nlvr"], ""),
        (
            "mafa_classification",
            "albef_nlvr_mafa",
            ["snli_ve"],
            "snli_ve has no labels that albef_nlvr_mafa tells; allowed here: grit_stat",
        ),
        ("mafa_classification", "albef_ve_mafa", ["grit_statements"], "grit_statements has no labels that albef_ve_mafa tells"),
        ("mafa_pretrain", "albef_ta_mafa", ["nlvr"], "nlvr has sentences that may be false"),
        ("mafa_pretrain", "albef_mafa", ["grit_statements"], "grit_statements has sentences that may be false"),
    ],
)
def test_labels_are_for_their_model_alone(task, arch, datasets, message):
    said = list(_labels(task, arch, dict.fromkeys(datasets)))
    assert len(said) == bool(message) and all(message in one for one in said)


def test_both_images_and_the_label_are_looked_at_before(data, tmp_path):
    """By check-data, whatever the columns are called; rows keep their numbers, and `max_images` counts statements."""
    wrong = [
        {"links": ["red.png", "gone.png"], "sentence": "one", "label": True},
        {"links": ["red.png"] * 2, "sentence": "b", "label": "no"},
    ]
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*wrong, wrong[0]]))
    info = "datasets.grit_statements.build_info"
    options = [f"{info}.annotations.val.storage={{annotations: {tmp_path / 'val.jsonl'}, columns: {{images: links}}}}"]
    options += [f"{info}.max_images=2", "run.evaluate=true"]
    command = ["check-data", "--cfg-path", str(data / "run.yaml"), "--output", str(tmp_path / "out"), "--options", *options]
    assert main(command) == 1
    found = json.loads((tmp_path / "out/check.json").read_text())
    assert (found["rows"], found["bad_rows"], found["captions"]) == (2, 2, 2) and found["kinds"]["unknown_label"]["rows"] == 1
    lines = [json.loads(line) for line in (tmp_path / "out/problems.jsonl").read_text().splitlines()]
    told = {(line["row"], line["kind"], line["image"]) for line in lines if line["kind"] in ("missing", "unknown_label")}
    assert told == {(1, "missing", "gone.png"), (2, "unknown_label", "red.png")} and len(lines) == 2
