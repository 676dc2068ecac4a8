"""What trades speed for something else, in real runs of the tiniest model: ``ecm.every`` and ``run.compile``."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from torch import nn

import launched
import outputs
from lavis_mafa.cli.main import main
from lavis_mafa.errors import UserError
from lavis_mafa.models.vit import Block
from lavis_mafa.runners import compiled

pytestmark = pytest.mark.slow
STEPS = 5  # of an epoch
OF_CON_D = {"new_positive_share", "ambiguous_share", "false_negative_share", "con_d_precision", "con_d_recall"}


def trained(run_yaml, *options: str):
    assert main(["train", "--cfg-path", str(run_yaml), "--options", "run.output_dir=output", *options]) == 0
    return outputs.newest_run(run_yaml.parent)


def test_con_d_has_its_own_rhythm_and_its_own_averages(run_yaml):
    every = "model.ecm.every=2"
    whole = trained(run_yaml, every)
    asked = [number for number in range(2 * STEPS) if number % 2 == 0]  # the second epoch begins between two
    records = outputs.metrics(whole)
    assert [number for number, record in enumerate(records) if "new_positive_share" in record] == asked
    for number, record in enumerate(records):
        assert number in asked or not OF_CON_D & record.keys()
        # its truth is perfect, so that every false negative becomes a positive
        assert number not in asked or record["new_positive_share"] == pytest.approx(record["false_negative_share"])
    table = pq.read_table(whole / "connections")
    pairs = {(epoch, step) for epoch, step in zip(table["epoch"].to_pylist(), table["step"].to_pylist(), strict=True)}
    assert pairs == {divmod(number, STEPS) for number in asked}

    (first, _) = outputs.metrics(trained(run_yaml, every, f"run.log_freq={STEPS}"))
    for name in ("new_positive_share", "false_negative_share"):
        assert first[name] == pytest.approx(sum(records[number][name] for number in asked if number < STEPS) / 3)

    part = trained(run_yaml, every, f"run.max_steps={STEPS + 2}")
    resumed = trained(run_yaml, every, f"run.resume_ckpt_path={part}/checkpoint_1_2.pth")
    outputs.assert_same_weights(whole / "checkpoint_1.pth", resumed / "checkpoint_1.pth")
    assert [outputs.timeless(r) for r in outputs.metrics(resumed)] == [outputs.timeless(r) for r in records[STEPS + 2 :]]


# --- run.compile ---------------------------------------------------------------------------------------------------------


def test_a_compiled_run_trains_validates_saves_and_resumes(run_yaml, monkeypatch):
    """With a teacher; names in its checkpoints are those of any run, and what it computes is nearly the same."""
    options = ["model.itc.momentum_distillation.queue_size=8", "run.valid_splits=[val]", "run.max_epoch=1"]
    options += [f"datasets.grit_pairs.build_info.annotations.val.storage={run_yaml.parent}/data/pairs.jsonl"]
    plain, ran = trained(run_yaml, *options), []
    monkeypatch.setattr(Block, "compile", lambda block: ran.append(block) or nn.Module.compile(block))
    whole = trained(run_yaml, *options, "run.compile=true")
    assert len(ran) == 2 and all(block._compiled_call_impl is not None for block in ran)  # the model's block, and its teacher's
    part = trained(run_yaml, *options, "run.compile=true", "run.max_steps=2")
    resumed = trained(run_yaml, *options, "run.compile=true", f"run.resume_ckpt_path={part}/checkpoint_0_2.pth")
    outputs.assert_same_weights(whole / "checkpoint_0.pth", resumed / "checkpoint_0.pth")
    before, after = outputs.weights(plain / "checkpoint_0.pth"), outputs.weights(whole / "checkpoint_0.pth")
    assert before.keys() == after.keys()
    first, other = outputs.metrics(plain)[0], outputs.metrics(whole)[0]
    assert other["loss"] == pytest.approx(first["loss"], rel=1e-4)
    assert outputs.json_lines(whole / "evaluation.jsonl")[-1]["split"] == "val"


@pytest.mark.parametrize("environment", [{"PATH": ""}, {"CXX": "true"}], ids=["none", "one that fails"])
def test_without_a_compiler_nothing_begins(run_yaml, environment):
    arguments = ["-m", "lavis_mafa", "train", "--cfg-path", str(run_yaml), "--options", "run.compile=true"]
    if "CXX" in environment:  # in a process of its own from the start: torch reads it when it is imported
        complete = {**os.environ, **environment}
        done = subprocess.run([sys.executable, *arguments], cwd=run_yaml.parent, env=complete, capture_output=True, text=True)
    else:
        done = launched.run(*arguments, cwd=run_yaml.parent, env=environment)
    said = [line for line in done.stderr.splitlines() if not re.match(r"W\d{4} ", line)]  # torch's own, of its CUDA
    assert done.returncode == 2 and len(said) == 1, done.stderr
    assert "run.compile is true, but torch cannot compile here" in said[0] and "CXX" in said[0] and "run.compile: false" in said[0]
    assert not (run_yaml.parent / "output").exists()


def test_without_triton_no_gpu_compiles(monkeypatch):
    monkeypatch.setattr(compiled, "has_triton_package", lambda: False)
    with pytest.raises(UserError, match="there is no triton"):
        compiled.check_compiler(on_gpu=True)
