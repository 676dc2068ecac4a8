"""Real runs of the command line: one process, two gloo processes, resumed, and through LAVIS's own way of starting."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import launched
import outputs

pytestmark = pytest.mark.slow

only_run, metrics, weights, assert_same_weights = outputs.only_run, outputs.metrics, outputs.weights, outputs.assert_same_weights


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory, tiny_yaml) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    done = launched.run("-m", "lavis_mafa", "train", "--cfg-path", tiny_yaml, cwd=folder)
    assert done.returncode == 0, done.stderr
    return only_run(folder)


def test_a_run_writes_losses_rates_verdicts_and_checkpoints(plain_run):
    records = metrics(plain_run)
    steps = max(r["step"] for r in records)
    assert len(records) == 2 * steps
    for record in records:
        for name in ("loss", "loss_itc", "loss_itm", "loss_mlm", "itm_accuracy_positive", "new_positive_share", "temperature"):
            assert isinstance(record[name], float)
        assert record["loss"] == pytest.approx(record["loss_itc"] + record["loss_itm"] + record["loss_mlm"], rel=1e-4)
        assert record["samples_seen"] == (record["epoch"] * steps + record["step"]) * 16
    # a perfect Con-D converts exactly the false negatives
    assert all(r["new_positive_share"] == pytest.approx(r["false_negative_share"], abs=1e-6) for r in records)
    table = pq.read_table(plain_run / "connections")
    assert {"epoch", "step", "direction", "image", "text", "probability", "verdict"} <= set(table.column_names)
    assert set(table["verdict"].to_pylist()) <= {"positive", "negative"}
    assert (plain_run / "checkpoint_1.pth").is_file() and list((plain_run / "tensorboard").iterdir())
    assert json.loads((plain_run / "evaluation.jsonl").read_text().splitlines()[-1])["split"] == "val"


def test_smoothing_starts_with_the_first_grouped_epoch(plain_run, tiny_yaml, run_cli, tmp_path):
    """Epoch 0 is random order: its losses do not depend on the smoothing; those of epoch 1 do."""
    assert run_cli("train", "--cfg-path", tiny_yaml, "--options", "model.itc.smoothing=0").returncode == 0
    smooth, plain = metrics(plain_run), metrics(only_run(tmp_path))
    assert [r["loss_itc"] for r in smooth if r["epoch"] == 0] == [r["loss_itc"] for r in plain if r["epoch"] == 0]
    assert [r["loss_itc"] for r in smooth if r["epoch"] == 1] != [r["loss_itc"] for r in plain if r["epoch"] == 1]


def test_the_discriminator_is_not_in_the_checkpoint(plain_run):
    assert not [name for name in weights(plain_run / "checkpoint_1.pth") if "discriminator" in name]


def test_a_resumed_run_ends_with_the_same_bits(tiny_yaml, run_cli, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    arguments = ["train", "--cfg-path", tiny_yaml, "--options", "run.test_splits=[]", "run.max_epoch=3"]
    assert run_cli(*arguments, cwd=whole).returncode == 0
    steps = max(r["step"] for r in metrics(only_run(whole)))
    stop = steps + steps // 2  # in the middle of the first grouped epoch
    assert run_cli(*arguments, f"run.max_steps={stop}", cwd=parts).returncode == 0
    first = only_run(parts)
    done = run_cli(*arguments, f"run.resume_ckpt_path={first}/checkpoint_1_{stop - steps}.pth", cwd=parts)
    assert done.returncode == 0, done.stderr
    second = outputs.newest_run(parts)
    assert_same_weights(only_run(whole) / "checkpoint_2.pth", second / "checkpoint_2.pth")
    wanted = [r["loss"] for r in metrics(only_run(whole))][stop:]
    assert [r["loss"] for r in metrics(second)] == wanted


def test_two_processes_equal_one_with_the_same_global_batch(tiny_yaml, run_cli, tmp_path):
    """batch_scope: global. Same samples a step, same negatives, so the same training up to rounding; without dropout and masking,
    whose draws differ between ranks. Each process writes its state and its connections."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    options = ["run.grit.batch_scope=global", "model.mlm.mask_probability=0", "run.precision=fp32", "run.test_splits=[]"]
    options += ["model.itm.negatives=hardest", "run.init_lr=1e-4"]
    done = run_cli("train", "--cfg-path", tiny_yaml, "--options", *options, "run.batch_size_train=16", cwd=one)
    assert done.returncode == 0, done.stderr
    done = run_cli("train", "--cfg-path", tiny_yaml, "--options", *options, "run.batch_size_train=8", cwd=two, processes=2)
    assert done.returncode == 0, done.stderr
    first, second = metrics(only_run(one)), metrics(only_run(two))
    assert [r["samples_seen"] for r in first] == [r["samples_seen"] for r in second]
    for a, b in zip(first, second, strict=True):
        for name in ("loss_itc", "loss_itm", "false_negative_share"):
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-4), (a["epoch"], a["step"], name)
    run = only_run(two)
    assert (run / "checkpoint_1.rank0.pth").is_file() and (run / "checkpoint_1.rank1.pth").is_file()
    assert len(list((run / "connections").glob("epoch_1_rank_*.parquet"))) == 2


LIKE_LAVIS = """
import argparse, random
import numpy as np
import torch
import lavis.tasks as tasks
from lavis.common.config import Config
from lavis.common.dist_utils import get_rank, init_distributed_mode
from lavis.common.logger import setup_logger
from lavis.common.optims import LinearWarmupCosineLRScheduler
from lavis.common.registry import registry
from lavis.common.utils import now
from lavis.models import *
from lavis.runners import *

parser = argparse.ArgumentParser()
parser.add_argument("--cfg-path")
parser.add_argument("--options", nargs="+")
cfg = Config(parser.parse_args())
init_distributed_mode(cfg.run_cfg)
torch.manual_seed(cfg.run_cfg.seed + get_rank())
setup_logger()
task = tasks.setup_task(cfg)
datasets = task.build_datasets(cfg)
model = task.build_model(cfg)
registry.get_runner_class(cfg.run_cfg.runner)(cfg=cfg, job_id=now(), task=task, model=model, datasets=datasets).train()
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_launcher_that_knows_lavis_alone_finds_us(tiny_yaml, tmp_path, processes):
    """The imports and calls of LAVIS's train.py, in its order; where there is one process, it begins with nothing imported."""
    script = tmp_path / "train.py"
    script.write_text(LIKE_LAVIS)
    options = ["run.seed=42", "run.device=cpu", "run.max_epoch=1", "run.batch_size_train=8", "run.test_splits=[]"]
    arguments = [str(script), "--cfg-path", str(tiny_yaml), "--options", *options, "run.dist_url=env://"]
    if processes == 1:
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    else:
        done = launched.run(*arguments, cwd=tmp_path, processes=processes)
    assert done.returncode == 0, done.stderr
    assert (only_run(tmp_path) / "checkpoint_0.pth").is_file()
