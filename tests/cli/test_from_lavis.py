"""docs/from-lavis.md: its diffs, put on LAVIS's own YAMLs, are all that is to change; and `validate` knows LAVIS's words."""

from __future__ import annotations

import re
from pathlib import Path

import lavis
import pytest

from lavis_mafa.cli.main import main
from lavis_mafa.config.schema import OLD_NAMES

PAGE = Path(__file__).parents[2] / "docs/from-lavis.md"
PROJECTS = Path(lavis.__file__).parent / "projects"


def diffs() -> dict[str, list[tuple[str, str]]]:
    """LAVIS's file -> what is replaced by what."""
    found = {}
    for block in re.findall(r"```diff\n--- lavis/projects/(.*?)```", PAGE.read_text(), re.S):
        name, *hunks = re.split(r"\n@@.*", block)
        sides = [["".join(line[1:] + "\n" for line in hunk.splitlines() if line[:1] == sign) for sign in "-+"] for hunk in hunks]
        found[name] = [(old, new) for old, new in sides]
    return found


def test_the_page_has_both():
    assert {name: len(hunks) for name, hunks in diffs().items()} == {
        "blip2/train/pretrain_stage1.yaml": 3,
        "albef/train/pretrain.yaml": 4,
    }


@pytest.mark.parametrize("name", diffs())
def test_the_diff_is_all_that_is_to_change(name, tmp_path, capsys):
    text = half = (PROJECTS / name).read_text()
    old_settings = []
    for old, new in diffs()[name]:
        assert text.count(old) == 1
        text = text.replace(old, new)
        for key in ("arch", "task"):  # the names alone
            if line := re.search(rf"  {key}: .*\n", old):
                half = half.replace(line[0], re.search(rf"  {key}: .*\n", new)[0])
        old_settings += re.findall(r"^  (\w+):", old, re.M)
    (tmp_path / "new.yaml").write_text(text)
    assert main(["validate", "--no-files", str(tmp_path / "new.yaml")]) == 0

    (tmp_path / "half.yaml").write_text(half)
    capsys.readouterr()
    assert main(["validate", str(tmp_path / "half.yaml")]) == 2
    said = capsys.readouterr().err
    for key in {*old_settings} - {"arch", "task", "model_type"}:  # all at once, each with our word for it
        assert re.search(rf"(model|run)\.{key} is not a setting. Here it is \1\.", said), key


def test_an_unknown_type_of_a_model_of_lavis_is_one_message(tmp_path, refused):
    lavis_yaml = (PROJECTS / "blip2/train/pretrain_stage1.yaml").read_text()
    (tmp_path / "a.yaml").write_text(lavis_yaml.replace("model_type: pretrain\n", "model_type: pretrian\n"))
    assert main(["validate", str(tmp_path / "a.yaml")]) == 2
    assert "model.model_type is pretrian, but blip2 has: pretrain, " in refused("train", "--cfg-path", tmp_path / "a.yaml")


def test_its_words_are_those_that_validate_knows():
    rows = re.findall(r"^\| (`(?:run|model)\..*?) \| (.*) \|$", PAGE.read_text().split("## Words")[1], re.M)
    assert len(rows) == 15
    for theirs, ours in rows:
        for word in re.findall(r"`((?:run|model)\.\w+)", theirs):
            assert re.match(r"[\w.]+", OLD_NAMES[word])[0].rsplit(".", 1)[-1] in ours, word
