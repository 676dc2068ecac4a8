"""Grounding by commands: trained, resumed, evaluated by one process and by two, and what is wrong with its data in one message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import launched
from boxes_file import box
from lavis_mafa.cli.main import main
from lavis_mafa.config.check import _boxes
from outputs import assert_same_weights

COLOURS = ["red", "blue", "green", "yellow"]
QUADRANTS = [box(0, 0, 8, 8), box(8, 0, 16, 8), box(0, 8, 8, 16), box(8, 8, 16, 16)]
YAML = """
model:
  arch: albef_mafa
  model_type: tiny
  image_encoder: {image_size: 16, patch_size: 4, width: 16, depth: 1, heads: 1}
  text_encoder: {width: 16, layers: 3, fusion_layer: 1, heads: 1}
  embed_dim: 8
  ecm: {enabled: false}
  itc: {smoothing: 0.0}
  mlm: {mask_probability: 0.0}
datasets:
  grit_boxes:
    build_info:
      annotations:
        train: {storage: DATA/train.jsonl}
        val: {storage: DATA/val.jsonl}
        testA: {storage: DATA/val.jsonl}
      images: {storage: DATA}
    vis_processor:
      train: {name: albef_image_train, image_size: 16, min_scale: 1.0, flip: false, randaugment: null}
      eval: {name: albef_image_eval, image_size: 16}
run:
  task: mafa_grounding
  init_lr: 1.0e-3
  max_epoch: 2
  batch_size_train: 4
  batch_size_eval: 2
  warmup_steps: 0
  num_workers: 0
  log_freq: 1
  valid_splits: [val]
  test_splits: [testA]
  device: cpu
"""


def rows(images: int = 3) -> list[dict]:
    """Of each image its four squares, whose colours are turned from image to image."""
    found = []
    for image in range(images):
        for number, place in enumerate(QUADRANTS):
            text = f"the {COLOURS[(image + number) % 4]} square"
            found.append(
                {"image": f"{image}.png", "text": text, "box": place, "boxes": QUADRANTS, "expression_id": f"{image}-{number}"}
            )
    return found


def write(path: Path, of: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in of))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for image in range(3):
        picture = Image.new("RGB", (16, 16))
        for number, place in enumerate(QUADRANTS):
            picture.paste(COLOURS[(image + number) % 4], (*place.values(),))
        picture.save(folder / f"{image}.png")
    write(folder / "train.jsonl", [{name: row[name] for name in ("image", "text")} for row in rows()])
    write(folder / "val.jsonl", rows())
    (folder / "run.yaml").write_text(YAML.replace("DATA", str(folder)))
    return folder


@pytest.fixture(scope="module")
def run(data) -> Callable[..., Path]:
    """Train, or evaluate, without an error; the folder of the run."""

    def command(name: str, folder: str, *options: str) -> Path:
        arguments = ["--cfg-path", str(data / "run.yaml"), "--options", f"run.output_dir={data / folder}", *options]
        assert main([name, *arguments]) == 0
        return max((data / folder).glob("2*"))

    return command


@pytest.fixture(scope="module")
def whole(run) -> Path:
    return run("train", "whole")


def results(folder: Path, split: str = "val") -> list[dict]:
    return json.loads((folder / f"result/{split}_grounding_result.json").read_text())


def figures(folder: Path) -> dict:
    record = json.loads((folder / "evaluation.jsonl").read_text().splitlines()[-1])
    return {name: value for name, value in record.items() if name not in ("split", "epoch")}


def test_a_resumed_training_is_the_whole_one(run, whole):
    """Stopped within an epoch, and the best epoch on val."""
    stopped = run("train", "parts", "run.max_steps=4")
    resumed = run("train", "parts", f"run.resume_ckpt_path={stopped / 'checkpoint_1_1.pth'}")
    for name in ("checkpoint_1.pth", "checkpoint_best.pth"):
        assert_same_weights(whole / name, resumed / name)
    assert results(resumed, "testA") == results(whole, "testA")


@pytest.mark.parametrize("heat", ["itm", "itc"])
def test_evaluating_a_checkpoint_gives_each_expression_a_box(run, whole, heat):
    options = [f"model.pretrained={whole / 'checkpoint_best.pth'}", "run.valid_splits=[]", f"run.heat={heat}"]
    evaluated = run("evaluate", heat, *options)
    told, found = results(evaluated, "testA"), figures(evaluated)
    assert [row["expression_id"] for row in told] == [row["expression_id"] for row in rows()]
    assert all(row["box"] is None or row["box"] in QUADRANTS for row in told)
    right = [row["box"] == of["box"] for row, of in zip(told, rows(), strict=True)]
    assert [row["right"] for row in told] == right == [row["iou"] >= 0.5 for row in told]
    assert found["accuracy"] == found["agg_metrics"] == pytest.approx(100 * sum(right) / 12)
    assert found["chance"] == 25 and found["without_hit"] == 0
    assert found["without_box"] == pytest.approx(100 * sum(row["box"] is None for row in told) / 12)
    if heat == "itm":
        assert told == results(whole, "testA") and found == figures(whole)


@pytest.mark.ranks
def test_two_processes_find_what_one_does(data, whole):
    """Three images: one is evaluated by both."""
    options = [f"model.pretrained={whole / 'checkpoint_best.pth'}", "run.valid_splits=[]", f"run.output_dir={data / 'ranks'}"]
    done = launched.run("-m", "lavis_mafa", "evaluate", "--cfg-path", data / "run.yaml", "--options", *options, cwd=data, processes=2)
    assert done.returncode == 0, done.stderr
    folder = max((data / "ranks").glob("2*"))
    assert results(folder, "testA") == results(whole, "testA") and figures(folder) == figures(whole)


def test_what_there_is_to_choose_from(data, run, whole):
    """The right box alone, none, and none that is right."""
    for number, (boxes, wanted) in enumerate(
        (
            ([], {"accuracy": 0, "chance": 0, "without_hit": 100, "without_box": 100}),
            ([box(0, 0, 16, 7)], {"accuracy": 0, "chance": 0, "without_hit": 100}),
            (None, {"accuracy": 100, "chance": 100, "without_hit": 0, "without_box": 0}),
        )
    ):
        write(data / "other.jsonl", [{**row, "boxes": [row["box"]] if boxes is None else boxes} for row in rows()])
        options = [f"model.pretrained={whole / 'checkpoint_best.pth'}", "run.valid_splits=[]", "run.heat=itc"]
        options += [f"datasets.grit_boxes.build_info.annotations.testA.storage={data / 'other.jsonl'}"]
        found = figures(run("evaluate", f"chosen_{number}", *options))
        assert {name: found[name] for name in wanted} == wanted


FIRST = rows()[0]
WRONG = [
    ("train.jsonl", {"image": "0.png"}, "no column 'text'"),
    ("train.jsonl", {"image": "../0.png", "text": "a"}, "row 1: image is '../0.png'; allowed: a path below the image folder"),
    ("val.jsonl", {"image": "0.png", "text": "a"}, "no column 'box'"),
    ("val.jsonl", {**FIRST, "box": None}, "row 1: a box is null; allowed: {left, top, right, bottom}"),
    ("val.jsonl", {**FIRST, "box": [0, 0, 8, 8]}, "row 1: a box is [0, 0, 8, 8]; allowed: {left, top, right, bottom}"),
    ("val.jsonl", {name: FIRST[name] for name in ("image", "text", "box")}, "no column 'boxes', the list of boxes"),
    ("val.jsonl", {**FIRST, "boxes": [box(0, 0, 17, 8)]}, "row 1: the box (0, 0, 17, 8) lies outside of 0.png, which is 16 x 16"),
]


@pytest.mark.parametrize(("name", "row", "message"), WRONG)
def test_wrong_data_are_one_message(name, row, message, data, tmp_path, refused):
    for file in data.glob("*.*"):
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    write(tmp_path / name, [row])
    (tmp_path / "run.yaml").write_text(YAML.replace("DATA", str(tmp_path)))
    assert message in (said := refused("train", "--cfg-path", tmp_path / "run.yaml")) and name in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run.layer=2"], "run.layer is 2, of 2 layers that look at images; from the last one no word's own map"),
        (["run.layer=1", "run.heat=itc"], "run.layer is 1, but run.heat: itc reads the image encoder's last block"),
        (["model.itm.weight=0.0"], "run.heat is itm, but model.itm is off, so that score is not trained"),
        (["run.area_power=2"], "run.area_power is 2.0, but must be between 0 and 1"),
        (["run.k_test=3"], "run.k_test is 3, but mafa_grounding has no use for it"),
        (["model.itc.smoothing=0.5"], "model.itc.smoothing is 0.5 with smooth_when: grouped"),
        (["run.task=mafa_pretrain", "run.grit.enabled=false"], "grit_boxes has boxes that a text means, but run.task is mafa_pretrain"),
    ],
)
def test_what_does_not_go_together(options, message, data, refused_early):
    assert message in refused_early("train", "--cfg-path", data / "run.yaml", "--options", *options)


def test_which_models_and_data_it_takes():
    assert not list(_boxes("mafa_grounding", "blip_mafa", {"grit_boxes": {}}))
    assert "allowed here: albef_mafa, blip_mafa" in next(_boxes("mafa_grounding", "albef_retrieval", {"grit_boxes": {}}))
    assert "grit_scenes has no boxes" in next(_boxes("mafa_grounding", "albef_mafa", {"grit_scenes": {}}))


def test_other_commands_read_these_data(data, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yaml = str(data / "run.yaml")
    assert main(["check-data", "--cfg-path", yaml, "--output", str(tmp_path / "checked")]) == 0
    assert json.loads(next(tmp_path.rglob("check.json")).read_text())["rows"] == 36
    given = ["--cfg-path", yaml, "--checkpoint", str(whole / "checkpoint_best.pth"), "--boxes", str(data / "val.jsonl")]
    assert main(["analyse", "grounding", *given]) == 0
    told = json.loads((tmp_path / "output/grounding/grounding.json").read_text())["results"]["box"]
    assert told["accuracy"] == pytest.approx(figures(whole)["accuracy"] / 100) and told["chance"] == 0.25
