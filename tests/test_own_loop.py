"""The code for torch-only users in README, docs/own-loop.md and docs/loss.md runs as it stands there."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def code(page: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    return block


@pytest.fixture
def run(tmp_path):
    def run(page: str) -> dict:
        script = tmp_path / "page.py"
        script.write_text(code(page), encoding="utf-8")
        with torch.random.fork_rng():
            return runpy.run_path(str(script))

    return run


def test_the_training_finds_false_negatives_and_learns(run, capsys):
    run("docs/own-loop.md")
    said = capsys.readouterr().out
    unlabelled = [float(number) for number in re.findall(r"false negatives an image ([\d.]+)", said)]
    found = [int(number) for number in re.findall(r"new positives (\d+)%", said)]
    assert min(unlabelled[1:]) > 2 * unlabelled[0] and min(found[2:]) > 2 * found[0], said
    assert int(re.findall(r"for (\d+)% of", said)[0]) > 70, said


def test_the_loss_alone_gains_from_false_negatives(run, capsys):
    run("docs/loss.md")
    plain, eliminated, converted = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines())
    assert plain + 0.05 < eliminated < converted - 0.05


def test_the_parts_give_a_loss(run):
    assert run("README.md")["loss"].isfinite()


@pytest.mark.parametrize("page", ["docs/own-loop.md", "docs/loss.md", "README.md"])
def test_it_needs_torch_alone(page):
    modules = {node.module for node in ast.walk(ast.parse(code(page))) if isinstance(node, ast.ImportFrom)}
    names = {alias.name for node in ast.walk(ast.parse(code(page))) if isinstance(node, ast.Import) for alias in node.names}
    allowed = {"torch", "lavis_mafa.objectives", "lavis_mafa.grit"}
    assert all(name in allowed or name.startswith("torch.") for name in modules | names)
