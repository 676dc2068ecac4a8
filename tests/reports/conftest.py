"""Two run folders written by hand and the page about them, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

import run_folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """``work/output/mafa/1`` with connections and ``work/output/grit/2`` without; the data are in ``work/data``."""
    work = tmp_path_factory.mktemp("work")
    run_folder.write_data(work / "data")
    mafa = run_folder.write_run(work / "output" / "20250101000000", run_folder.many(1000))
    grit = run_folder.write_run(work / "grit", None, smoothing=0.0)
    return mafa, grit


@pytest.fixture(scope="session")
def page(runs, tmp_path_factory) -> Path:
    """The page about both runs."""
    from lavis_mafa.cli.main import main

    path = tmp_path_factory.mktemp("page") / "report.html"
    assert main(["report", *map(str, runs), "--output", str(path)]) == 0
    return path
