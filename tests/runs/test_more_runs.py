"""Real runs of the command line with one setting each that the plain run leaves out."""

from __future__ import annotations

import json
import math

import pytest
import torch

import outputs
from lavis_mafa.datasets.emoji.truth import first_concepts, read_truth

pytestmark = pytest.mark.slow

metrics, newest_run, only_run = outputs.metrics, outputs.newest_run, outputs.only_run


@pytest.fixture(scope="module")
def steps(emoji) -> int:
    """Steps of an epoch: batches of 16 from the first 60 concepts."""
    concepts = set(first_concepts(read_truth(emoji), 60).to_pylist())
    return sum(json.loads(line)["concept"] in concepts for line in (emoji / "train.jsonl").open()) // 16


def test_max_steps_of_one_epoch_in_bf16_then_a_resume_that_keeps_the_best_checkpoint(tiny_yaml, run_cli, tmp_path, steps):
    arguments = ["train", "--cfg-path", tiny_yaml, "--options", "run.precision=bf16", "run.valid_splits=[val]"]
    done = run_cli(*arguments, "run.test_splits=[]", f"run.max_steps={steps}")
    assert done.returncode == 0, done.stderr
    first = only_run(tmp_path)
    records = metrics(first)
    assert [(r["epoch"], r["step"]) for r in records] == [(0, step + 1) for step in range(steps)]
    assert all(math.isfinite(value) for record in records for value in record.values())
    written = {path.name for path in first.glob("checkpoint*.pth")}
    assert written == {"checkpoint_0.pth", "checkpoint_0.rank0.pth", "checkpoint_best.pth"}
    # nothing is learned any more, so no later epoch is better than the one before the resume
    frozen = ["run.init_lr=0", "run.min_lr=0", "run.warmup_lr=0"]
    done = run_cli(*arguments, *frozen, f"run.resume_ckpt_path={first}/checkpoint_0.pth")
    assert done.returncode == 0, done.stderr
    second = newest_run(tmp_path)
    assert {r["epoch"] for r in metrics(second)} == {1}
    evaluated = outputs.json_lines(second / "evaluation.jsonl")
    assert [(e["split"], e["epoch"]) for e in evaluated] == [
        ("val", 0),
        ("val", 1),
        ("val", "best"),
    ]  # it was saved before it was evaluated
    outputs.assert_same_weights(first / "checkpoint_best.pth", second / "checkpoint_best.pth")


def test_a_separate_pass_groups_the_first_epoch(tiny_yaml, run_cli, tmp_path):
    """So smoothing acts in it from the first step on, on the same batch."""
    runs = []
    for smoothing in (0.5, 0):
        folder = tmp_path / str(smoothing)
        folder.mkdir()
        options = ["run.grit.collect=separate", "run.max_steps=2", "run.test_splits=[]", f"model.itc.smoothing={smoothing}"]
        done = run_cli("train", "--cfg-path", tiny_yaml, "--options", *options, cwd=folder)
        assert done.returncode == 0, done.stderr
        runs.append(only_run(folder))
        sampler = torch.load(runs[-1] / "checkpoint_0_2.rank0.pth", weights_only=True)["feed"]["sampler"]
        assert sampler["grouped"] is True and sampler["epoch"] == 0
    smooth, plain = (metrics(run)[0] for run in runs)
    assert smooth["loss_itm"] == plain["loss_itm"] and smooth["false_negative_share"] == plain["false_negative_share"]
    assert smooth["loss_itc"] != plain["loss_itc"]


def test_a_trained_con_d_teaches_two_processes_with_momentum_and_masking(tiny_yaml, run_cli, tmp_path):
    done = run_cli("train", "--cfg-path", tiny_yaml, "--options", "model.ecm.enabled=false", "run.max_steps=2", "run.test_splits=[]")
    assert done.returncode == 0, done.stderr
    con_d = only_run(tmp_path) / "checkpoint_0_2.pth"
    options = [f"model.discriminator={{arch: albef_mafa, checkpoint: {con_d}}}", "run.grit.batch_scope=global"]
    options += ["run.batch_size_train=8", "model.itc.momentum_distillation={queue_size: 64}", "run.max_steps=11"]
    options += ["model.ecm.threshold=0", "model.ecm.ambiguous_from=0", "run.test_splits=[]"]  # two steps taught it nothing yet
    done = run_cli("train", "--cfg-path", tiny_yaml, "--options", *options, processes=2)
    assert done.returncode == 0, done.stderr
    records = metrics(newest_run(tmp_path))
    assert len(records) == 11 and {r["epoch"] for r in records} == {0, 1}
    for record in records:
        assert record["new_positive_share"] == pytest.approx(1.0) and record["loss_mlm"] > 0
        assert all(math.isfinite(value) for value in record.values())
