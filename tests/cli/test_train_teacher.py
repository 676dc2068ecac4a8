"""A language teacher from a YAML's captions, and a run that learns from it."""

from __future__ import annotations

from pathlib import Path

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


OTHERS = {  # in place of ALBEF's block
    "blip": "  text_encoder: {init: null, width: 16, layers: 1, heads: 1}",
    "blip2": "  qformer: {init: null, width: 16, layers: 1, heads: 1, queries: 2}",
}


@pytest.mark.parametrize("host", OTHERS)
def test_a_teacher_of_bert_s_words_serves_the_other_hosts(run_yaml, host, tmp_path):
    """Theirs has [DEC] and [ENC] besides, which no folder of a BERT has."""
    yaml = run_yaml.with_name(f"{host}.yaml")
    lines = [OTHERS[host] if "text_encoder" in line else line for line in run_yaml.read_text().splitlines()]
    yaml.write_text("\n".join(lines).replace("albef_mafa", f"{host}_mafa"))
    small = ["--steps", "1", "--batch-size", "8", "--width", "16", "--layers", "1", "--heads", "2"]
    assert main(["train-teacher", "--cfg-path", str(yaml), "--output", "teacher", *small]) == 0
    words = Path("teacher/vocab.txt").read_text().splitlines()
    assert len(words) == 30522 and "[DEC]" not in words
    options = ["run.output_dir=output", "run.max_steps=1", "model.language_teacher.init=teacher", "model.itm.synthetic={top_k: 4}"]
    assert main(["train", "--cfg-path", str(yaml), "--options", *options]) == 0
    (record,) = outputs.metrics(outputs.newest_run(tmp_path))
    assert {"synthetic_share", "itm_accuracy_extra_negative", "extra_judged_true_share"} <= record.keys()
