"""The quickstart's runs and its report, shortened to seconds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_quickstart_compares_random_batches_grit_and_mafa_against_the_truth(run_cli, tmp_path):
    """ALBEF's and BLIP-2's, on the same scenes: building them is what takes longest."""
    options = ["run.max_epoch=2", "datasets.grit_scenes.build_info.max_images=128", "run.batch_size_train=32", "run.log_freq=2"]
    grit = ["run.grit.queue_size=128", "run.grit.search_space=64", "run.k_test=8"]
    for model, ranked_by, pages in (("albef", "itm", "[0-9]*/report.html"), ("blip2", "itm+itc", "blip2_*/report.html")):
        done = run_cli("quickstart", "--model", model, "--options", *options, *grit)
        assert done.returncode == 0, done.stderr
        for words in ("ITM is given", "precision", "TR R@1", "MAFA", "GRIT", "points of R-Precision, TR; p ", "report.html"):
            assert words in done.stdout
        (page,) = (tmp_path / "quickstart" / "report").glob(pages)
        results = json.loads(page.with_name("results.json").read_text())
        assert results["batches"]["random"]["per_batch"] > 0
        assert set(results["retrieval"]) == {"start", "random", "GRIT", "MAFA"}
        found = results["retrieval"]["MAFA"]["val"]
        assert 0 <= found["tr_r1"] <= 100 and found["rank_by"] == ranked_by and found["half_tr_r1"] > 0
        assert f"{found['tr_r1']:.1f} ± {found['half_tr_r1']:.1f}" in done.stdout
        compared = results["compared"]["val"]["GRIT"]["tr"]
        assert abs(compared["mean_a"] - found["tr_r_precision"]) < 1e-4, "the difference is of what the table shows"
        html = page.read_text()
        assert not re.search(r"(src|href)=\"https?:", html)  # it needs no network
        assert "data:image/png;base64," in html
        assert Path(page.with_name("curves.png")).stat().st_size > 1000
