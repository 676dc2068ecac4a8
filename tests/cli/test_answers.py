"""Questions answered by commands: trained, resumed, ranked, written, and what is wrong with data and answers in one message."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from lavis_mafa.cli.main import main
from lavis_mafa.config.check import _questions, check_lavis, inference_of
from lavis_mafa.config.schema import typed_block
from lavis_mafa.errors import UserError
from lavis_mafa.models.albef_vqa import AlbefVqaMafa
from outputs import assert_same_weights

COLOURS = ["red", "blue", "grey"]
YAML = """
model:
  arch: albef_vqa_mafa
  model_type: tiny
  image_encoder: {image_size: 16, patch_size: 8, width: 16, depth: 1, heads: 1}
  text_encoder: {width: 16, layers: 2, fusion_layer: 1, heads: 1}
  momentum_distillation: {momentum: 0.9}
datasets:
  grit_vqa:
    build_info:
      annotations:
        train: {storage: DATA/train.jsonl}
        val: {storage: DATA/val.csv}
      images: {storage: DATA}
    vis_processor:
      train: {name: albef_image_train, image_size: 16, randaugment: null}
      eval: {name: albef_image_eval, image_size: 16}
run:
  task: mafa_vqa
  init_lr: 1.0e-2
  max_epoch: 2
  batch_size_train: 4
  batch_size_eval: 2
  warmup_steps: 0
  num_workers: 0
  log_freq: 1
  valid_splits: [val]
  test_splits: [val]
  device: cpu
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for colour in COLOURS:
        Image.new("RGB", (16, 16), colour).save(folder / f"{colour}.png")
    rows = [
        {"image": f"{colour}.png", "question": question, "answer": answer, "question_id": f"{number}-{colour}"}
        for number in range(3)
        for colour in COLOURS
        for question, answer in (("which colour?", [colour, colour, "dark"]), ("is it bright?", "no" if colour == "grey" else "yes"))
        if number or answer != "no"
    ]
    for number, row in enumerate(rows):
        row["question_id"] = number
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [f"{colour}.png,which colour?,{colour},{colour}" for colour in COLOURS]
    (folder / "val.csv").write_text("\n".join(["image,question,answer,question_id", *asked, "red.png,who?,Nobody,who"]))
    (folder / "run.yaml").write_text(YAML.replace("DATA", str(folder)))
    return folder


@pytest.fixture(scope="module")
def run(data) -> Callable[..., Path]:
    """Train, or evaluate, without an error; the folder of the run."""

    def command(name: str, folder: str, *options: str, yaml: str = "run.yaml") -> Path:
        output = data / folder
        arguments = ["--cfg-path", str(data / yaml), "--options", f"run.output_dir={output}", *options]
        assert main([name, *arguments]) == 0
        return max(output.glob("2*"))

    return command


@pytest.fixture(scope="module")
def whole(run) -> Path:
    return run("train", "whole")


@pytest.fixture
def refused_in_time(refused, monkeypatch):
    """A message before a model is built, and so before weights are read."""

    def not_yet(*_: object) -> None:
        raise AssertionError("the model was built before the mistake was found")

    monkeypatch.setattr(AlbefVqaMafa, "__init__", not_yet)
    return refused


def results(folder: Path) -> list[dict[str, str]]:
    return json.loads((folder / "result/val_vqa_result.json").read_text())


def figures(folder: Path) -> dict[str, float]:
    return [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()][-1]


def test_a_resumed_training_is_the_whole_one(run, whole):
    """Stopped within an epoch, with a teacher and the best epoch on val."""
    stopped = run("train", "parts", "run.max_steps=6")
    resumed = run("train", "parts", f"run.resume_ckpt_path={stopped / 'checkpoint_1_2.pth'}")
    for name in ("checkpoint_1.pth", "checkpoint_best.pth"):
        assert_same_weights(whole / name, resumed / name)
    assert results(resumed) == results(whole)


def test_evaluating_a_checkpoint_gives_the_runs_figures(run, whole, caplog):
    """The answers of the training split are ranked; that nobody is right of one question is a line of the log."""
    options = [f"model.pretrained={whole / 'checkpoint_best.pth'}", "model.momentum_distillation=null", "run.valid_splits=[]"]
    caplog.set_level("INFO")
    evaluated = run("evaluate", "evaluated", *options)
    told = results(evaluated)
    assert told == results(whole) and figures(evaluated)["accuracy"] == figures(whole)["accuracy"]
    assert [row["question_id"] for row in told] == [*COLOURS, "who"]
    assert {row["answer"] for row in told} <= {"red", "dark", "yes", "blue", "grey", "no"}
    right = [row["answer"] == row["question_id"] for row in told]
    assert figures(evaluated)["accuracy"] == pytest.approx(100 * sum(right) / 4)
    assert "split 'val': 6 answers are ranked; 1 of 4 questions have no right one among them" in caplog.text
    (evaluated.parents[1] / "list.txt").write_text("blue\n")
    given = run("evaluate", "given", *options, f"run.answer_list={evaluated.parents[1] / 'list.txt'}", "run.num_ans_candidates=1")
    assert [row["answer"] for row in results(given)] == ["blue"] * 4
    written = run("evaluate", "written", *options, "run.inference=generate", "run.num_beams=1", "run.max_len=2", "run.min_len=2")
    assert all(len(row["answer"].split()) <= 2 and row["answer"] for row in results(written))


def official(folder: Path) -> None:
    """Questions, people's answers and Visual Genome's, as their authors publish them, made LAVIS's by the snippet of the docs."""
    (folder / "vg").mkdir()
    for number, colour in enumerate(COLOURS):
        for place in ("train2014/COCO_train2014", "val2014/COCO_val2014", "test2015/COCO_test2015"):
            path = folder / f"{place}_{number:012d}.jpg"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (16, 16), colour).save(path)
        Image.new("RGB", (16, 16), colour).save(folder / f"vg/{number}.jpg")
    for part, year in (("train", 2014), ("val", 2014), ("test", 2015)):
        rows = [{"question_id": f"{part}{n}", "image_id": n, "question": "Which colour?"} for n in range(3)]
        answers = [[{"answer": colour, "answer_id": person} for person in range(10)] for colour in COLOURS]
        people = [{**row, "answer_type": "other", "answers": said} for row, said in zip(rows, answers, strict=True)]
        (folder / f"v2_OpenEnded_mscoco_{part}{year}_questions.json").write_text(json.dumps({"questions": rows}))
        (folder / f"v2_mscoco_{part}{year}_annotations.json").write_text(json.dumps({"annotations": people}))
    told = {"qa_id": 1, "image_id": 0, "question": "Who is it?", "answer": "Nobody."}
    (folder / "question_answers.json").write_text(json.dumps([{"id": 0, "qas": [told] * 2}]))
    (folder / "answer_list.json").write_text(json.dumps(COLOURS))
    page = (Path(__file__).parents[2] / "docs/downstream.md").read_text(encoding="utf-8")
    (snippet,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "v2_mscoco" in code]
    exec(snippet, {})


def test_vqa2_with_visual_genome_in_lavis_layout(run, whole, refused, tmp_path, monkeypatch):
    """Official accuracy, VG's answers by a weight of ours, and a test split whose answers nobody knows."""
    monkeypatch.chdir(tmp_path)
    official(tmp_path)
    (row,) = json.loads((tmp_path / "vg_qa.json").read_text())[:1]
    assert row == {"question_id": 1, "question": "Who is it?", "answer": "nobody", "image": "0.jpg"}

    def block(images: Path, **splits: list[str]) -> dict[str, object]:
        paths = {split: [str(tmp_path / f"{name}.json") for name in names] for split, names in splits.items()}
        annotations = {split: {"url": files, "storage": files} for split, files in paths.items()}
        return {"annotations": annotations, "images": {"storage": str(images)}}

    of_val = ["vqa_val_eval", "answer_list", "v2_OpenEnded_mscoco_val2014_questions", "v2_mscoco_val2014_annotations"]
    coco = block(tmp_path, train=["vqa_train", "vqa_val"], val=of_val, test=["vqa_test", "answer_list"])
    content = OmegaConf.create(YAML)
    eyes = {"train": {"name": "albef_image_train", "image_size": 16}, "eval": {"name": "albef_image_eval", "image_size": 16}}
    common = {"vis_processor": eyes, "text_processor": {"train": {"name": "blip_question"}, "eval": {"name": "blip_question"}}}
    content.datasets = {
        "coco_vqa": {"build_info": coco, **common},
        "vg_vqa": {"build_info": {**block(tmp_path / "vg", train=["vg_qa"]), "answer_weight": 0.5}, **common},
    }
    yaml = str(tmp_path / "coco.yaml")
    OmegaConf.save(content, yaml)
    trained = run("train", "coco", f"model.pretrained={whole / 'checkpoint_best.pth'}", "run.test_splits=[test]", yaml=yaml)
    told = results(trained)
    assert [row["question_id"] for row in told] == ["val0", "val1", "val2"] and {row["answer"] for row in told} <= set(COLOURS)
    right = 100 * sum(row["answer"] == colour for row, colour in zip(told, COLOURS, strict=True)) / 3
    last = [one for one in map(json.loads, (trained / "evaluation.jsonl").read_text().splitlines()) if one["split"] == "val"][-1]
    assert last["accuracy"] == last["accuracy_other"] == pytest.approx(right)
    assert [row["question_id"] for row in json.loads((trained / "result/test_vqa_result.json").read_text())] == [
        "test0",
        "test1",
        "test2",
    ]

    arguments = ["train", "--cfg-path", yaml, "--options"]
    said = refused(*arguments, "datasets.vg_vqa.build_info.answer_weight=2")
    assert "datasets.vg_vqa.build_info.answer_weight is 2; allowed: a number from 0 to 1" in said
    said = refused(*arguments, "run.num_ans_candidates=4")
    assert "run.num_ans_candidates is 4, but datasets.coco_vqa, split 'val' ranks 3 answers" in said
    (tmp_path / "answer_list.json").write_text(json.dumps(["none"]))
    said = refused(*arguments, "run.seed=1")
    assert "not one of 3 questions has a right answer among the 1 that are ranked, such as 'none'" in said


WRONG = [
    ("train.jsonl", '{"image": "red.png", "question": "a"}', "no column 'answer'; its columns are image, question."),
    ("train.jsonl", '{"image": "red.png", "question": "a", "answer": []}', "row 1: the answer is empty or null"),
    ("train.jsonl", '{"image": "none.png", "question": "a", "answer": "b"}', "row 1: no image at "),
    ("val.csv", "image,question,answer\nred.png,nan,neutral", "the question 'nan' is how a missing one is written"),
    ("val.csv", "image,question,answer,question_id\nred.png,a,b,1\nred.png,b,a,1", "question_id 1 is there twice"),
    ("list.json", '["red", "red"]', "answer 2 is 'red', as answer 1 is; allowed: a JSON list of texts (.json), or one text a line"),
    ("list.json", '["red", 2]', "answer 2 is 2; allowed: a JSON list"),
    ("list.json", "[]", "holds no answer; allowed: a JSON list"),
    ("list.json", '{"red": 1}', "holds dict; allowed: a JSON list"),
    ("list.json", "red\nblue", "is not valid (Expecting value"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_wrong_data_are_one_message(name, content, message, data, tmp_path, refused_in_time):
    for file in ("train.jsonl", "val.csv", "red.png", "blue.png", "grey.png"):
        (tmp_path / file).write_bytes((data / file).read_bytes())
    (tmp_path / name).write_text(content)
    (tmp_path / "run.yaml").write_text(YAML.replace("DATA", str(tmp_path)))
    options = [f"run.answer_list={tmp_path / name}"] if name == "list.json" else []
    said = refused_in_time("train", "--cfg-path", tmp_path / "run.yaml", "--options", "run.seed=1", *options)
    assert message in said and name in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run.task=mafa_pretrain"], "model.arch is albef_vqa_mafa; allowed here: run.task: mafa_vqa or mafa_gqa"),
        (["run.num_beams=3", "run.length_penalty=1"], "run.num_beams is 3, but has no use where run.inference is rank; leave it out"),
        (["run.prompt='{}'"], "run.prompt is '{}', but has no use where run.inference is rank"),
        (["run.inference=generate"], "run.num_beams is 5, but albef_vqa_mafa generates without beams; allowed: 1"),
        (["run.inference=generate", "run.num_beams=1", "run.num_ans_candidates=2"], "run.num_ans_candidates is 2, but has no use"),
        (["run.inference=generate", "run.num_beams=1", "run.length_penalty=0"], "run.length_penalty is 0.0, but has no use"),
        (["run.num_ans_candidates=7"], "run.num_ans_candidates is 7, but datasets.grit_vqa, split 'val' ranks 6 answers"),
        (["run.answer_list=none.json"], "run.answer_list is 'none.json', but there is no such file."),
        (["run.inference_method=rank"], "run.inference_method is not a setting. Here it is run.inference."),
        (["model.pretrained=FILE"], "model.pretrained: FILE has a classifier (cls_head)"),
    ],
)
def test_what_does_not_go_together(options, message, data, tmp_path, refused_in_time):
    file = str(tmp_path / "ve.pth")
    torch.save({"text_encoder.embeddings.LayerNorm.bias": torch.zeros(1), "cls_head.0.weight": torch.zeros(1)}, file)
    options = [option.replace("FILE", file) for option in options]
    assert message.replace("FILE", file) in refused_in_time("train", "--cfg-path", data / "run.yaml", "--options", *options)


def test_without_training_answers_a_list_is_asked_for(data, whole, refused_in_time):
    options = [f"model.pretrained={whole / 'checkpoint_best.pth'}", "datasets.grit_vqa.build_info.annotations.train.storage=null"]
    said = refused_in_time("evaluate", "--cfg-path", data / "run.yaml", "--options", *options)
    assert "datasets.grit_vqa, split 'val': there are no answers to rank; give run.answer_list" in said


def test_how_models_answer():
    run = typed_block("run", {"task": "mafa_vqa"})
    found = {
        arch: (inference_of(arch, run), inference_of(arch, run, listed=False)) for arch in ("albef_vqa", "blip_vqa", "blip2_opt_mafa")
    }
    assert found == {"albef_vqa": ("rank", "rank"), "blip_vqa": ("rank", "generate"), "blip2_opt_mafa": ("generate", "generate")}
    for arch, how in (("albef_vqa", "generate"), ("blip2_opt_mafa", "rank"), ("blip2_t5", "rank")):
        with pytest.raises(UserError, match=f"run.inference is {how}, but {arch} cannot"):
            inference_of(arch, typed_block("run", {"task": "mafa_vqa", "inference": how}))


def test_questions_are_for_their_tasks_alone():
    weighed = {"vg_vqa": {"build_info": {"answer_weight": 0.5}}}
    for task, datasets, message in (
        ("mafa_vqa", {"grit_vqa": {}, **weighed}, ""),
        (
            "mafa_pretrain",
            {"grit_vqa": {}},
            "grit_vqa has questions with answers, but run.task is mafa_pretrain; allowed here: mafa_vqa",
        ),
        ("vqa", weighed, "answer_weight is set, but vqa does not know it"),
        ("mafa_captioning", {"coco_caption": {}}, ""),
    ):
        said = list(_questions(task, datasets))
        assert len(said) == bool(message) and all(message in one for one in said)


def test_laviss_own_script_is_told_so_too():
    model = {"arch": "albef_vqa_mafa", "model_type": "tiny"}
    run = {"task": "mafa_vqa", "device": "cpu", "num_beams": 2}
    with pytest.raises(UserError, match="run.num_beams is 2, but has no use"):
        check_lavis(OmegaConf.create({"model": model, "run": run, "datasets": {"grit_vqa": {}}}))


def test_what_other_commands_say(data, tmp_path):
    assert main(["validate", str(data / "run.yaml")]) == 0
    assert main(["check-data", "--cfg-path", str(data / "run.yaml"), "--output", str(tmp_path)]) == 0
    checked = json.loads((next(tmp_path.rglob("check.json"))).read_text())
    assert checked["rows"] == 21, checked
