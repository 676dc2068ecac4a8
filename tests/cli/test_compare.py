"""`lavis-mafa compare`: the table, the words, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import run_folder
from lavis_mafa.cli.main import main
from lavis_mafa.tools.significance import paired


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    """``work/mafa/1`` and ``work/grit/2``, which were scored on the same gallery."""
    folders = (tmp_path / "work/mafa/20250101000000", tmp_path / "work/grit/20250101000000")
    for folder, right, seed in zip(folders, (2.5, 1.0), (1, 2), strict=True):
        run_folder.write_scores(run_folder.write_run(folder, None), right, seed)
    return folders


def test_table_and_words(runs, capsys):
    assert main(["compare", *map(str, runs)]) == 0
    said = capsys.readouterr().out
    about, head, *lines, empty, words, more = said.splitlines()
    assert about.startswith("val: 30 images, 60 texts;") and head.split() == ["mafa", "grit", "mafa", "-", "grit"] and not empty
    assert [line.split("  ")[0] for line in lines] == [f"{d} {m}" for d in ("TR", "IR") for m in ("R-Precision", "R@1", "mAP@R")]
    assert all(re.fullmatch(r".+?( +-?\+?[\d.]+ \[\S+, \S+\]){3}  p (<|=) \S+", line) for line in lines), said
    found = paired(*runs, "val", "r_precision", "tr")
    assert words == found.sentence("mafa", "grit") and words.startswith("mafa above grit by") and ", IR; p" in more
    for number in (found.mean_a, found.mean_b, found.difference, found.low, found.high):
        assert f"{number:.1f}" in lines[0]

    assert main(["compare", *map(str, runs), "--metric", "itc_r1", "r5", "--split", "val", "--names", "A", "B"]) == 0
    said = capsys.readouterr().out
    assert "TR R@1 by ITC alone" in said and "IR R@5" in said and "mAP" not in said
    assert sum(line.startswith("A above B") or line.startswith("A and B") for line in said.splitlines()) == 2


def test_wrong_calls_are_one_message(runs, refused, tmp_path):
    mafa, grit = runs
    assert "is both runs; give two" in refused("compare", mafa, mafa)
    assert "no metrics of single queries of the split 'test'" in refused("compare", mafa, grit, "--split", "val", "test")
    old = run_folder.write_run(tmp_path / "old", None)
    said = refused("compare", mafa, old)
    assert f"{old} has no metrics of single queries of the split 'val'" in said and "those of: none" in said
    assert f"{old} has no metrics of single queries" in refused("compare", old, mafa)
    assert "Did you mean 'map_at_r'?" in refused("compare", mafa, grit, "--metric", "map_at_k")
    other = run_folder.write_scores(run_folder.write_run(tmp_path / "other", None), 1.0, texts=61)
    assert "other galleries in the split 'val'" in refused("compare", mafa, other)
    assert "is no folder" in refused("compare", mafa, tmp_path / "nowhere")
