"""Which rows a run trains on and evaluates: what ``run.*_splits`` name, or one message before anything slow."""

from __future__ import annotations

import json

import pytest
import torch

from lavis_mafa.cli.main import main


@pytest.fixture
def val(pairs):
    """The options that name rows 0 to 7 as ``val`` too."""
    rows = (pairs / "pairs.jsonl").read_text().splitlines()[:8]
    (pairs / "val.jsonl").write_text("\n".join(rows))
    return f"datasets.grit_pairs.build_info.annotations.val.storage={pairs}/val.jsonl"


@pytest.mark.parametrize(("splits", "rows"), [("train,val", 28), ("val", 8), ("train", 20)])
def test_all_rows_of_the_splits_are_trained_on(run_yaml, val, tmp_path, splits, rows):
    options = ["run.max_epoch=1", f"run.train_splits=[{splits}]", "run.valid_splits=[val]", val]
    assert main(["train", "--cfg-path", str(run_yaml), "--options", *options]) == 0
    (run,) = (tmp_path / "output").glob("2*")
    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert len(records) == rows // 4
    order = torch.load(run / "checkpoint_0.rank0.pth", weights_only=True)["feed"]["sampler"]["order"]
    assert sorted(order.tolist()) == list(range(rows))
    (line,) = (run / "evaluation.jsonl").open()
    assert json.loads(line)["split"] == "val"


@pytest.mark.parametrize("key", ["run.valid_splits", "run.test_splits"])
def test_the_training_split_is_not_evaluated(run_yaml, refused_early, key):
    said = refused_early("train", "--cfg-path", run_yaml, "--options", f"{key}=[train]")
    assert f"{key} names 'train'" in said and "annotations.val.storage" in said
