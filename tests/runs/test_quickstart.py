"""The quickstart's three runs and its report, shortened to seconds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_quickstart_compares_grit_and_mafa_against_the_truth(run_cli, tmp_path):
    options = ["run.max_epoch=2", "datasets.grit_emoji.build_info.max_concepts=80", "run.batch_size_train=16", "run.log_freq=2"]
    grit = ["run.grit.queue_size=64", "run.grit.search_space=32"]
    done = run_cli("quickstart", "--options", *options, *grit)
    assert done.returncode == 0, done.stderr
    for words in ("of hardest negatives", "precision", "TR R@1", "MAFA", "GRIT", "report.html"):
        assert words in done.stdout
    (page,) = (tmp_path / "quickstart" / "report").glob("*/report.html")
    results = json.loads(page.with_name("results.json").read_text())
    assert results["batches"]["random"]["per_batch"] > 0
    assert set(results["retrieval"]) == {"start", "GRIT", "MAFA"}
    found = results["retrieval"]["MAFA"]["val"]
    assert 0 <= found["tr_r1"] <= 100 and found["rank_by"] == "itm"
    for score, prefix in (("itm", ""), ("itc", "itc_")):
        assert f"  MAFA    {score:9s} {found[prefix + 'tr_r1']:8.1f} {found[prefix + 'ir_r1']:8.1f}" in done.stdout
    html = page.read_text()
    assert not re.search(r"(src|href)=\"https?:", html)  # it needs no network
    assert "data:image/png;base64," in html
    assert Path(page.with_name("curves.png")).stat().st_size > 1000


def test_quickstart_of_blip2_ends_with_captions_and_answers(run_cli, tmp_path):
    options = ["run.max_epoch=1", "datasets.grit_emoji.build_info.max_concepts=60", "run.batch_size_train=16", "run.log_freq=4"]
    done = run_cli("quickstart", "--model", "blip2", "--options", *options, "run.grit.queue_size=64", "run.grit.search_space=32")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "quickstart" / "blip2").glob("*/results.json")
    results = json.loads(path.read_text())
    assert set(results["captions"]) == set(results["answers"]) == {"val", "test"}
    assert 0 <= results["answers"]["val"]["accuracy"] <= 100 and results["captions"]["val"]["cider"] >= 0
    assert all(example["right"] and isinstance(example["caption"], str) for example in results["examples"]["val"])
    assert "ranked by itm+itc" in done.stdout and "ranked by itc" in done.stdout
    for words in ("new drawings of known concepts", "BLEU-4", "answers right", "what is this?", str(path.relative_to(tmp_path))):
        assert words in done.stdout
    (run,) = (tmp_path / "quickstart" / "stage_1").iterdir()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [b - a for a, b in zip([0, *(r["step"] for r in records)], [r["step"] for r in records], strict=False)]
    mean = sum(r["loss_itc"] * n for r, n in zip(records, steps, strict=True)) / sum(steps)
    assert abs(results["stage_1"]["loss_itc"] - mean) < 1e-6, "an average over steps, not the last record"
