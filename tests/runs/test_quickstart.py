"""The quickstart's three runs and its report, shortened to seconds."""

from __future__ import annotations

import json
import re
from pathlib import Path


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
    assert 0 <= results["retrieval"]["MAFA"]["val"]["tr_r1"] <= 100
    html = page.read_text()
    assert not re.search(r"(src|href)=\"https?:", html)  # it needs no network
    assert "data:image/png;base64," in html
    assert Path(page.with_name("curves.png")).stat().st_size > 1000
