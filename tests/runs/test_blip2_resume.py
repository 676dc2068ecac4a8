"""BLIP-2 goes on from the middle of an epoch with the same bits, though its checkpoints leave frozen parts out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lavis_mafa.cli.main import main
from lavis_mafa.files import last_checkpoint
from lavis_mafa.tools.run_files import read_metrics
from lavis_mafa.weights import read_weights

pytestmark = pytest.mark.slow

SMALL = ["run.max_epoch=2", "run.batch_size_train=16", "run.log_freq=1", "run.warmup_steps=2", "run.test_splits=[]"]
SIZES = ["model.image_encoder.width=32", "model.image_encoder.depth=2", "model.image_encoder.heads=2", "model.qformer.init=null"]
SIZES += ["model.qformer.width=32", "model.qformer.layers=2", "model.qformer.heads=2"]


@pytest.fixture
def run(tmp_path, emoji, monkeypatch):
    """Run a YAML of the BLIP-2 quickstart on 60 concepts; the folder it wrote."""
    monkeypatch.chdir(tmp_path)

    def start(yaml: str, name: str, *options: str) -> Path:
        data = f"datasets.grit_emoji.build_info={{root: {emoji}, max_concepts: 60}}"
        arguments = ["--options", data, f"run.output_dir={name}", *SMALL, *SIZES, *options]
        assert main(["train", "--cfg-path", f"mafa/quickstart/blip2/{yaml}.yaml", *arguments]) == 0
        return max((tmp_path / name).glob("2*"), key=lambda folder: folder.stat().st_mtime)

    return start


def same_from(run, yaml: str, left_out: tuple[str, ...], *options: str) -> None:
    whole = run(yaml, "whole", *options)
    half = run(yaml, "half", *options, "run.max_steps=12")
    stopped = last_checkpoint(half)
    assert stopped.name == "checkpoint_1_3.pth", "nine steps an epoch: in the middle of the second"
    rest = run(yaml, "rest", *options, f"run.resume_ckpt_path={stopped}")
    one, other = read_weights(last_checkpoint(whole)), read_weights(last_checkpoint(rest))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not any(name.startswith(left_out) for name in one)
    losses = [[(r["epoch"], r["step"], r["loss"]) for r in read_metrics(folder)] for folder in (whole, half, rest)]
    assert losses[0] == losses[1] + losses[2]


def test_stage_1_with_a_frozen_vit_of_its_own_file(run):
    con_d = last_checkpoint(run("con_d", "con_d", "run.max_steps=2"))
    frozen = [f"model.image_encoder.init={con_d}", f"model.discriminator.checkpoint={con_d}", "model.ecm.threshold=0.2"]
    same_from(
        run,
        "stage_1",
        ("visual_encoder.",),
        *frozen,
        "model.ecm.ambiguous_from=0.1",
        "run.grit.queue_size=64",
        "run.grit.search_space=32",
    )


def test_stage_2_with_a_frozen_language_model_in_a_folder(run, tmp_path):
    from lavis_mafa.config.schema import LanguageModel
    from lavis_mafa.models.blip2_opt import build_opt

    model, tokenizer = build_opt(LanguageModel(init=None, freeze=False, precision="fp32", width=32, layers=1, heads=2))
    model.save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    stage_1 = last_checkpoint(run("con_d", "con_d", "run.max_steps=2"))
    parts = [f"model.image_encoder.init={stage_1}", f"model.language_model.init={tmp_path}/opt", "model.language_model.freeze=true"]
    same_from(run, "stage_2", ("visual_encoder.", "opt_model."), f"model.stage_1={stage_1}", *parts)
