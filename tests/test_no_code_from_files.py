"""Loading never runs code: what ruff's rules (S, TID251 in pyproject.toml) cannot see. The attacks are in cli/test_hostile_files.py."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for place in ("lavis_mafa", "docs", "benchmarks", "projects") for path in sorted((ROOT / place).rglob("*.py"))]
LOADERS = ("torch.load", "torch.hub.load_state_dict_from_url")
FLAGS = ("allow_pickle", "trust_remote_code", "pickle_module", "use_pickle")
BUILTINS = ("eval", "exec", "compile", "__import__")
RUNS_A_MODULE = [ROOT / "lavis_mafa" / "plugin.py"]  # LAVIS's own loader, wrapped


def wrong(source: str, may_execute: bool = False) -> list[str]:
    """Loaders that are not called with a literal ``weights_only=True``, flags that unpickle, and modules run from a file."""
    found, safe = [], set()
    for node in ast.walk(ast.parse(source)):  # a call comes before the name that it calls
        if isinstance(node, ast.Call):
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            found += [f"{node.lineno}: {flag}={said[flag]}" for flag in FLAGS if said.get(flag, "False") != "False"]
            safe |= {node.func} if said.get("weights_only") == "True" else set()
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [f"{node.lineno}: {name} without its module" for name in names if name in LOADERS]
        elif isinstance(node, ast.Name) and node.id in BUILTINS and isinstance(node.ctx, ast.Load):  # not even named: map(eval, texts)
            found.append(f"{node.lineno}: {node.id}")
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in LOADERS and node not in safe:
            found.append(f"{node.lineno}: {ast.unparse(node)} without weights_only=True")
        elif isinstance(node, ast.Attribute) and node.attr == "exec_module" and not may_execute:
            found.append(f"{node.lineno}: exec_module")
    return found


def test_no_source_reads_a_file_in_a_way_that_runs_code():
    assert len(FILES) > 100
    found = {str(path): wrong(path.read_text(encoding="utf-8"), path in RUNS_A_MODULE) for path in FILES}
    assert not {path: lines for path, lines in found.items() if lines}


@pytest.mark.parametrize(
    "snippet",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=flag)",
        "map(torch.load, files)",
        "from torch import load as read",
        "torch.hub.load_state_dict_from_url(url)",
        "torch.load(path, weights_only=True, pickle_module=other)",
        "np.load(path, allow_pickle=options.pickle)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "run = spec.loader.exec_module",
        "map(eval, texts)",
        "__import__(name)",
    ],
)
def test_the_walk_finds(snippet):
    assert wrong(snippet)
    assert not wrong("torch.load(path, weights_only=True, **options)\nnp.load(path, allow_pickle=False)")


def test_ruff_finds_the_rest():
    snippets = [
        "pickle.loads(text)",
        "from pickle import loads",
        "import joblib",
        "import marshal",
        "import runpy",
        "torch.jit.load(path)",
        "torch.hub.load('owner/name', 'model')",
        "torch.serialization.add_safe_globals([dict])",
        "from omegaconf import OmegaConf; OmegaConf.register_new_resolver('eval', print)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "importlib.import_module(text)",
        "import builtins",
    ]
    source = "\n".join(["import importlib, os, pickle, subprocess, torch, yaml", *snippets, ""])
    command = ["check", "--select", "S,TID251", "--output-format", "concise", "--stdin-filename", "lavis_mafa/snippets.py", "-"]
    done = subprocess.run([sys.executable, "-m", "ruff", *command], cwd=ROOT, input=source, capture_output=True, text=True)
    lines = {int(number) for number in re.findall(r"snippets\.py:(\d+):", done.stdout)}
    assert lines >= set(range(2, len(snippets) + 2)), done.stdout + done.stderr


def test_the_torch_we_ask_for_runs_no_code_where_nobody_says_anything():
    """LAVIS and transformers call torch.load without the flag, so its default has to be the safe one: since torch 2.6."""
    (floor,) = re.findall(r'"torch>=([0-9.]+)"', (ROOT / "setup.py").read_text())
    assert tuple(map(int, floor.split("."))) >= (2, 6)
