"""A tiny BLIP-2 from nothing to captions and answers, with two processes, through the shipped YAMLs.

With one it is resumed in test_blip2_resume.py, and compared in test_quickstart.py; what tasks make of shares is in test_ranks.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import launched
from lavis_mafa.files import last_checkpoint
from lavis_mafa.tools.run_files import read_connections, read_evaluations, read_metrics
from lavis_mafa.weights import read_weights

pytestmark = pytest.mark.slow

SHORT = [
    "run.max_epoch=2",
    "run.max_steps=6",
    "datasets.grit_emoji.build_info.max_concepts=60",
    "run.batch_size_train=8",
    "run.log_freq=1",
]
SHORT += ["run.grit.queue_size=64", "run.grit.search_space=32"]


@pytest.fixture(scope="module")
def runs(emoji, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("blip2")
    script = Path(__file__).with_name("blip2_chain.py")
    ports = ",".join(launched.free_port() for _ in range(5))
    done = launched.run(script, emoji, ports, *SHORT, cwd=folder, processes=2, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    (folder / "stderr.txt").write_text(done.stderr)
    folders = json.loads(done.stdout.strip().splitlines()[-1])
    return {"folder": folder, **{name: Path(path) for name, path in folders.items()}}


def records(run: Path) -> list[dict[str, Any]]:
    found = read_metrics(run)
    assert [r["samples_seen"] for r in found] == sorted(r["samples_seen"] for r in found)
    return found


def test_stage_1_trains_with_mafa_on_a_vit_that_con_d_shares(runs):
    steps = records(runs["stage_1"])
    assert all(math.isfinite(step[loss]) for step in steps for loss in ("loss", "loss_itc", "loss_itm", "loss_lm"))
    assert max(step["new_positive_share"] for step in steps) > 0 and "false_negative_share" in steps[-1]
    assert "Con-D has the weights of the model's frozen image encoder: it runs once" in (runs["folder"] / "stderr.txt").read_text()
    before, after = (read_weights(last_checkpoint(runs[name])) for name in ("con_d", "stage_1"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith("visual_encoder.") for name in changed)
    found = read_connections(runs["stage_1"])
    assert found.num_rows > 0 and "probability" in found.column_names
    assert 0 <= read_evaluations(runs["stage_1"])["val"]["tr_r1"] <= 100


def test_stage_2_learns_on_top_of_stage_1(runs):
    steps = records(runs["stage_2"])
    assert all(math.isfinite(step["loss_lm"]) for step in steps) and steps[-1]["loss_lm"] < steps[0]["loss_lm"]
    assert "of its text branch and heads left behind" in (runs["folder"] / "stderr.txt").read_text()
    first, second = (read_weights(last_checkpoint(runs[name])) for name in ("stage_1", "stage_2"))
    vit = [name for name in first if name.startswith("visual_encoder.")]
    assert vit and all(torch.equal(first[name], second[name]) for name in vit)


def test_every_image_gets_one_caption_and_every_question_one_answer(runs):
    for name, file, key in (("captions", "{}_epochlast.json", "image_id"), ("vqa", "{}_vqa_result.json", "question_id")):
        scores = read_evaluations(runs[name])
        for split in ("val", "test"):
            rows = json.loads((runs[name] / "result" / file.format(split)).read_text())
            assert sorted(row[key] for row in rows) == list(range(len(rows))) and len(rows) > 3
            figures = ("bleu_4", "cider", "rouge_l") if name == "captions" else ("accuracy",)
            assert all(0 <= scores[split][figure] <= 1000 for figure in figures)
