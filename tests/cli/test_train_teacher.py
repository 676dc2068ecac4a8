"""A language teacher from a YAML's captions, and a run that learns from it."""

from __future__ import annotations

import pytest

import outputs
from lavis_mafa.cli.main import main

pytestmark = pytest.mark.slow
STEPS = 5  # of an epoch


def trained(run_yaml, *options: str):
    teacher = ["model.language_teacher.init=teacher", "model.mlm.cross_distillation=0.5"]
    assert main(["train", "--cfg-path", str(run_yaml), "--options", "run.output_dir=output", *teacher, *options]) == 0
    return outputs.newest_run(run_yaml.parent)


def test_a_teacher_is_trained_used_and_resumed_with(run_yaml, capsys):
    small = ["--steps", "3", "--batch-size", "8", "--width", "16", "--layers", "1", "--heads", "2"]
    command = ["train-teacher", "--cfg-path", str(run_yaml), "--output", "teacher", *small]
    assert main(command) == 0
    assert "of the masked words of those held out it guesses" in capsys.readouterr().out
    assert main(command) == 2 and "never overwritten" in capsys.readouterr().err
    synthetic = "model.itm.synthetic={top_k: 4}"
    whole = trained(run_yaml, synthetic)
    for record in outputs.metrics(whole):
        assert {"teacher_top1", "synthetic_share", "itm_accuracy_extra_negative", "extra_judged_true_share"} <= record.keys()
    part = trained(run_yaml, synthetic, f"run.max_steps={STEPS + 2}")
    resumed = trained(run_yaml, synthetic, f"run.resume_ckpt_path={part}/checkpoint_1_2.pth")
    outputs.assert_same_weights(whole / "checkpoint_1.pth", resumed / "checkpoint_1.pth")
