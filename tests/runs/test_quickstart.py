"""The quickstart's runs and its report, shortened to seconds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_quickstart_compares_random_batches_grit_and_mafa_against_the_truth(run_cli, tmp_path):
    options = ["run.max_epoch=2", "datasets.grit_scenes.build_info.max_images=128", "run.batch_size_train=32", "run.log_freq=2"]
    grit = ["run.grit.queue_size=128", "run.grit.search_space=64", "run.k_test=8"]
    done = run_cli("quickstart", "--options", *options, *grit)
    assert done.returncode == 0, done.stderr
    for words in ("ITM is given", "precision", "TR R@1", "MAFA", "GRIT", "points of R-Precision, TR; p ", "report.html"):
        assert words in done.stdout
    (page,) = (tmp_path / "quickstart" / "report").glob("*/report.html")
    results = json.loads(page.with_name("results.json").read_text())
    assert results["batches"]["random"]["per_batch"] > 0
    assert set(results["retrieval"]) == {"start", "random", "GRIT", "MAFA"}
    found = results["retrieval"]["MAFA"]["val"]
    assert 0 <= found["tr_r1"] <= 100 and found["rank_by"] == "itm" and found["half_tr_r1"] > 0
    assert f"{found['tr_r1']:.1f} ± {found['half_tr_r1']:.1f}" in done.stdout
    compared = results["compared"]["val"]["GRIT"]["tr"]
    assert abs(compared["mean_a"] - found["tr_r_precision"]) < 1e-4, "the difference is of what the table shows"
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
