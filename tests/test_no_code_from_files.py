"""Loading never runs code: nothing in the sources reads a file in a way that could. The attacks are in cli/test_hostile_files.py."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("lavis_mafa", "docs", "benchmarks", "run_scripts", "projects")
FILES = [path for place in PLACES for path in sorted((ROOT / place).rglob("*.py"))]

# unpickles or runs whatever it is given; not even named, since a name can be handed on: map(eval, texts)
FORBIDDEN = {
    "eval": "runs text",
    "exec": "runs text",
    "compile": "runs text",
    "os.system": "runs text in a shell",
    "os.popen": "runs text in a shell",
    "subprocess.getoutput": "runs text in a shell",
    "subprocess.getstatusoutput": "runs text in a shell",
    "torch.jit.load": "runs a file",
    "torch.package.PackageImporter": "runs a file",
    "torch.hub.load": "runs a repository",
    "torch.serialization.add_safe_globals": "widens what weights_only allows",
    "torch.serialization.safe_globals": "widens what weights_only allows",
    "torch.serialization.load": "unpickles",
    "omegaconf.OmegaConf.register_new_resolver": "lets a YAML call a function",
    "OmegaConf.register_new_resolver": "lets a YAML call a function",
    "pandas.read_pickle": "unpickles",
    "yaml.load": "may build any object; yaml.safe_load does not",
    "yaml.load_all": "may build any object",
    "yaml.unsafe_load": "builds any object",
    "yaml.unsafe_load_all": "builds any object",
    "yaml.full_load": "builds some objects",
    "yaml.full_load_all": "builds some objects",
}
FORBIDDEN_MODULES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "hydra", "runpy")
FORBIDDEN_KEYWORDS = {
    ("allow_pickle", True): "numpy unpickles",
    ("trust_remote_code", True): "transformers runs the hub's code",
    ("shell", True): "runs text in a shell",
    ("use_pickle", True): "unpickles",
}
# what imports a module from a file; ours is LAVIS's own loader, which plugin.py wraps
EXECUTING = "exec_module"
EXECUTES = ("lavis_mafa/plugin.py",)
MUST_SAY_WEIGHTS_ONLY = ("torch.load", "torch.hub.load_state_dict_from_url")
# what imports by a name that is not written out, and where that name comes from
IMPORTS_BY_NAME = {
    "lavis_mafa/cli/main.py": "the command table in the same file",
    "lavis_mafa/datasets/emoji/texts.py": "written out; the packages are an extra that may be missing",
}
IMPORTERS = ("importlib.import_module", "__import__", "importlib.__import__", "pydoc.locate")


def wrong_calls(source: str, name: str = "snippet.py") -> Iterator[str]:
    """Every call and import in the source that can run code from a file, as ``name:line: what``."""
    tree = ast.parse(source)
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        for module in modules:
            if module.split(".")[0] in FORBIDDEN_MODULES:
                yield f"{name}:{node.lineno}: imports {module}, which unpickles or builds any object"
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        problems: list[str] = []
        if isinstance(node, ast.Name | ast.Attribute):
            problems += _named(_full(node, aliases), name, id(node) in called)
        if isinstance(node, ast.Attribute) and node.attr == EXECUTING and name not in EXECUTES:
            problems.append(f"{EXECUTING} runs a file")
        if isinstance(node, ast.Call):
            problems += _called(node, aliases, name)
        yield from (f"{name}:{node.lineno}: {problem}" for problem in problems)


def _full(node: ast.expr, aliases: dict[str, str]) -> str:
    """The dotted name without its alias, and without ``builtins.``"""
    first, *rest = ast.unparse(node).split(".")
    return ".".join([aliases.get(first, first), *rest]).removeprefix("builtins.")


def _named(function: str, name: str, called: bool) -> Iterator[str]:
    """Problems of a name, wherever it stands; those that are allowed when called rightly may not be handed on."""
    if function in FORBIDDEN:
        yield f"{function} {FORBIDDEN[function]}"
    if function in MUST_SAY_WEIGHTS_ONLY and not called:
        yield f"{function} handed on; call it with a literal weights_only=True"
    if function in IMPORTERS and name not in IMPORTS_BY_NAME:
        yield f"{function} of a name from elsewhere; list the file in IMPORTS_BY_NAME with the reason if that is right"


def _called(call: ast.Call, aliases: dict[str, str], name: str) -> Iterator[str]:
    function = _full(call.func, aliases)
    said = {keyword.arg: keyword.value for keyword in call.keywords}
    if function in MUST_SAY_WEIGHTS_ONLY:
        flag = said.get("weights_only")
        if not isinstance(flag, ast.Constant) or flag.value is not True:
            yield f"{function} without a literal weights_only=True"
    if "pickle_module" in said:
        yield "pickle_module= unpickles"
    if function == "getattr" and len(call.args) > 1 and isinstance(call.args[1], ast.Constant):
        yield from _named(f"{_full(call.args[0], aliases)}.{call.args[1].value}".removeprefix("builtins."), name, False)
    for (keyword, value), reason in FORBIDDEN_KEYWORDS.items():
        given = said.get(keyword)
        # a variable could be anything
        if given is not None and not (isinstance(given, ast.Constant) and given.value is not value):
            yield f"{keyword}={ast.unparse(given)}: {reason}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_source_reads_no_file_in_a_way_that_runs_code(path):
    assert not list(wrong_calls(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()))


def test_every_place_is_walked():
    walked = {path.relative_to(ROOT).parts[0] for path in FILES}
    assert {"lavis_mafa", "docs", "benchmarks"} <= walked and len(FILES) > 100
    assert all((ROOT / file).is_file() for file in IMPORTS_BY_NAME)


@pytest.mark.parametrize(
    "snippet",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "torch.load(path, **options)",
        "import torch as t\nt.load(path)",
        "from torch import load as read\nread(path)",
        "from torch import load\nload(path)",
        "torch.hub.load_state_dict_from_url(url)",
        "torch.hub.load('owner/name', 'model')",
        "torch.jit.load(path)",
        "from torch.serialization import add_safe_globals\nadd_safe_globals([dict])",
        "import pickle",
        "import numpy, dill as d",
        "from pickle import loads",
        "from hydra.utils import instantiate",
        "import joblib",
        "import shelve",
        "import marshal",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=options.pickle)",
        "yaml.load(text, Loader=yaml.Loader)",
        "from yaml import unsafe_load\nunsafe_load(text)",
        "yaml.full_load(text)",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "from os import system\nsystem(text)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "importlib.import_module(config.name)",
        "from importlib import import_module as by_name\nby_name(config.name)",
        "__import__(config.name)",
        "map(torch.load, files)",
        "partial(torch.load, weights_only=False)",
        "read = torch.load",
        "from torch import load as read\nmap(read, files)",
        "getattr(torch, 'load')(path)",
        "getattr(builtins, 'eval')(text)",
        "import torch as t\ngetattr(t.serialization, 'add_safe_globals')([dict])",
        "OmegaConf.register_new_resolver('eval', eval)",
        "OmegaConf.register_new_resolver('call', call)",
        "from omegaconf import OmegaConf as O\nO.register_new_resolver('call', call)",
        "with torch.serialization.safe_globals([dict]):\n    pass",
        "import runpy",
        "from runpy import run_path",
        "spec.loader.exec_module(module)",
        "run = loader.exec_module",
        "builtins.exec(text)",
        "import builtins as b\nb.exec(text)",
        "map(eval, texts)",
        "torch.load(path, weights_only=True, pickle_module=other)",
        "importer = importlib.import_module",
    ],
)
def test_the_walk_finds(snippet):
    assert list(wrong_calls(snippet))


@pytest.mark.parametrize(
    "snippet",
    [
        "torch.load(path, map_location='cpu', weights_only=True)",
        "torch.load(path, weights_only=True, **options)",
        "np.load(path)",
        "np.load(path, allow_pickle=False)",
        "yaml.safe_load(text)",
        "model.eval()",
        "re.compile('a')",
        "subprocess.run([sys.executable, file], check=True)",
        "OmegaConf.load(path)",
        "json.load(file)",
        "getattr(torch, 'float16')",
        "map(json.load, files)",
        "model.eval",
    ],
)
def test_the_walk_leaves_alone(snippet):
    assert not list(wrong_calls(snippet))


def test_the_torch_we_ask_for_runs_no_code_where_nobody_says_anything():
    """LAVIS and transformers call torch.load without the flag, so its default has to be the safe one: since torch 2.6."""
    (floor,) = re.findall(r'"torch>=([0-9.]+)"', (ROOT / "setup.py").read_text())
    assert tuple(map(int, floor.split("."))) >= (2, 6)
