"""Pages that could drift from the code."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import yaml

from lavis_mafa import __version__
from lavis_mafa.config.read import project_files
from lavis_mafa.tools.ablate import load_tables

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_configuration_page_is_what_the_settings_say():
    made = runpy.run_path(str(DOCS / "make_configuration.py"))["render"]()
    assert made == (DOCS / "configuration.md").read_text(encoding="utf-8"), "run python docs/make_configuration.py"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_pages_name_files_that_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:lavis_mafa|projects|tests|benchmarks|run_scripts|docs)/[\w./-]+)`", text):
        assert (DOCS.parent / path).exists(), path


def test_the_papers_page_names_every_table_and_yaml_that_is_there():
    text = (DOCS / "papers.md").read_text(encoding="utf-8")
    assert set(re.findall(r"--table ([\w-]+)", text)) == set(load_tables())
    yamls = re.findall(r"`(mafa/[\w/]+\.yaml)`", text)
    assert yamls and set(yamls) <= set(project_files())


def test_what_is_cited_is_this_version():
    cited = yaml.safe_load((DOCS.parent / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(cited["version"]) == __version__ and any("MAFA: " in paper["title"] for paper in cited["references"])
