"""The quickstart's runs and its report, shortened to seconds."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest

from lavis_mafa.cli.main import main
from lavis_mafa.datasets.scenes import build

pytestmark = pytest.mark.slow


def test_quickstart_compares_random_batches_grit_and_mafa_against_the_truth(tmp_path, monkeypatch, capsys):
    """ALBEF's and BLIP-2's, on the same scenes, which are few: all of them take a minute to build."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "build_scenes", partial(build.build_scenes, train=128, test=48, progress=False))
    options = ["run.max_epoch=2", "run.batch_size_train=32", "run.log_freq=2"]
    grit = ["run.grit.queue_size=128", "run.grit.search_space=64", "run.k_test=8"]
    for model, ranked_by, pages in (("albef", "itm", "[0-9]*/report.html"), ("blip2", "itm+itc", "blip2_*/report.html")):
        capsys.readouterr()
        assert main(["quickstart", "--model", model, "--options", *options, *grit]) == 0
        said = capsys.readouterr().out
        for words in ("ITM is given", "precision", "TR R@1", "MAFA", "GRIT", "points of R-Precision, TR; p ", "report.html"):
            assert words in said
        (page,) = (tmp_path / "quickstart" / "report").glob(pages)
        results = json.loads(page.with_name("results.json").read_text())
        assert results["batches"]["random"]["per_batch"] > 0
        assert set(results["retrieval"]) == {"start", "random", "GRIT", "MAFA"}
        found = results["retrieval"]["MAFA"]["val"]
        assert 0 <= found["tr_r1"] <= 100 and found["rank_by"] == ranked_by and found["half_tr_r1"] > 0
        assert f"{found['tr_r1']:.1f} ± {found['half_tr_r1']:.1f}" in said
        compared = results["compared"]["val"]["GRIT"]["tr"]
        assert abs(compared["mean_a"] - found["tr_r_precision"]) < 1e-4, "the difference is of what the table shows"
        html = page.read_text()
        assert not re.search(r"(src|href)=\"https?:", html)  # it needs no network
        assert "data:image/png;base64," in html
        assert Path(page.with_name("curves.png")).stat().st_size > 1000
