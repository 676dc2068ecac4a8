"""The plugin is found without an import of ours, and behaves when it is switched off, doubled, or alone."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lavis_mafa.plugin import beyond_tested

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# nothing of lavis_mafa is to be found, as where an editable install's clone was deleted
GONE = (
    "import sys\n"
    "class Hide:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name.split('.')[0] == 'lavis_mafa': raise ModuleNotFoundError(name)\n"
    "sys.meta_path.insert(0, Hide())\n"
)


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], env={**os.environ, **env}, capture_output=True, text=True)


def test_load_model_needs_no_import_of_ours():
    """Torch first."""
    done = python("import torch; from lavis.models import load_model; print(type(load_model('albef_mafa', 'tiny')).__name__)")
    assert done.stdout.split()[-1:] == ["AlbefMafa"], done.stderr


def test_lavis_before_torch():
    asked = "from lavis.common.registry import registry as r; print(r.get_task_class('mafa_pretrain'))"
    done = python(f"import lavis.tasks, torch; {asked}")
    assert "MafaPretrainTask" in done.stdout, done.stderr


def test_a_transformers_beyond_those_tested_is_one_line(tmp_path, monkeypatch):
    for version, untested in (("4.26.1", False), ("4.57.6", False), ("4.58.0rc1", True), ("5.1.0", True)):
        monkeypatch.setattr("importlib.metadata.version", lambda name, version=version: version)
        assert (beyond_tested() is not None) == untested
    info = tmp_path / "transformers-5.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.1.0\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = python("import lavis; from lavis_mafa.cli.main import main; print(main(['ls']))", PYTHONPATH=path)
    line = "transformers is 5.1.0, but LAVIS and lavis-mafa run with 4.25 to 4.57; docs/install.md says"
    ours = [told for told in done.stderr.splitlines() if "5.1.0" in told]
    assert [told.split(" how ")[0] for told in ours] == [line, f"lavis-mafa ls: {line}"] and done.stdout.split() == ["2"], done.stderr


def test_torch_without_lavis_is_left_alone():
    hidden = (
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'lavis' or name.startswith('lavis.'): raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    done = python(hidden + "import torch\nprint(torch.ones(1).item(), 'transformers' in sys.modules)")
    assert done.stdout.split() == ["1.0", "False"], done.stderr


def test_importing_the_package_is_light():
    done = python("import sys, lavis_mafa; print([m for m in ('torch', 'lavis', 'transformers') if m in sys.modules])")
    assert done.stdout.strip() == "[]"


def test_what_reads_plain_files_does_not_wait_for_lavis():
    done = python(
        "import sys, lavis_mafa.datasets.emoji.build, lavis_mafa.datasets.pairs, lavis_mafa.tools.report; print(*sys.modules)"
    )
    assert "torch" in done.stdout.split() and "lavis" not in done.stdout.split(), done.stderr


def test_an_editable_install_whose_clone_is_gone_leaves_torch_alone(tmp_path):
    """pip's own step, without the isolated environment: what it puts into site-packages, then the clone is deleted."""
    clone, site = tmp_path / "clone", tmp_path / "site"
    (clone / "lavis_mafa").mkdir(parents=True)
    (clone / "projects").mkdir()
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "lavis_mafa_autoload.py", "lavis_mafa/__init__.py"):
        shutil.copy(ROOT / file, clone / file)
    build = f"import os; os.chdir({str(clone)!r}); from setuptools.build_meta import build_editable; build_editable({str(tmp_path)!r})"
    done = python(build)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    shutil.rmtree(clone)
    done = python(GONE + f"sys.path.insert(0, {str(site)!r})\nimport torch\nprint(torch.ones(1).item())")
    assert done.stdout.split() == ["1.0"], done.stderr
    assert "lavis-mafa is installed, but cannot be imported" in done.stderr and len(done.stderr.splitlines()) == 1
    (entries,) = site.glob("*.dist-info/entry_points.txt")
    entries.write_text(entries.read_text().replace("lavis_mafa_autoload:", "lavis_mafa.plugin:"))  # what the file is for
    assert "Failed to load the backend extension" in python(GONE + f"sys.path.insert(0, {str(site)!r})\nimport torch").stderr


def another_order(folder: Path) -> str:
    """As LAVIS later than 1.0.2, whose builders import models, and those its tasks: ours cannot import the builders yet then. The code
    that imports such a one from ``folder``, and asks for ours."""
    origin = Path(importlib.util.find_spec("lavis").origin)
    (folder / "lavis").mkdir()
    builders = "lavis.datasets.builders.base_dataset_builder"
    midway = f"__path__ = [{str(origin.parent)!r}]\nimport sys\n"
    midway += f"import lavis.common.registry\nsys.modules[{builders!r}] = None\nimport lavis.models, lavis.tasks\n"
    rest = f"del sys.modules[{builders!r}]\n" + origin.read_text().replace("__file__", repr(str(origin)))
    (folder / "lavis" / "__init__.py").write_text(midway + rest)
    return (
        f"import sys; sys.path.insert(0, {str(folder)!r}); import lavis; assert lavis.__file__.startswith({str(folder)!r});"
        "from lavis.common.registry import registry as r;"
        "assert r.get_model_class('albef_mafa') and r.get_task_class('mafa_pretrain') and 'coco_caption' in r.list_datasets()"
    )


def test_a_lavis_that_imports_its_parts_in_another_order_and_then_torch(tmp_path):
    done = python(another_order(tmp_path))
    assert done.returncode == 0, done.stderr


# what LAVIS imports stays, LAVIS itself is forgotten: each child imports it anew, which would take seconds otherwise
IN_CHILDREN = """
import gc, importlib.util, json, os, sys
from lavis.common.registry import registry
assert registry.get_model_class("albef_mafa") is None, "LAVIS_MAFA_AUTOLOAD=0 switches us off"
for name in [name for name in sys.modules if name.split(".")[0] == "lavis"]:
    del sys.modules[name]
del os.environ["LAVIS_MAFA_AUTOLOAD"]
from lavis_mafa.plugin import install_hook
install_hook()
gc.freeze()

def as_tools_do(name):
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)

for name, code in json.load(sys.stdin).items():
    assert "lavis" not in sys.modules
    if os.fork() == 0:
        exec(code)
        os._exit(0)
    print("fine" if os.wait()[1] == 0 else "FAILS", name, flush=True)
"""
LAVIS_KNOWS_US = """
from lavis.common.registry import registry
from lavis.models import load_model
assert registry.get_runner_class("runner_mafa") and registry.get_processor_class("albef_caption")
"""
TWICE = """
import importlib, lavis, lavis_mafa.plugin as plugin
plugin.register(); plugin.register(); importlib.reload(plugin).register()
assert "albef_mafa" in lavis.registry.list_models()
"""


def test_after_torch_lavis_knows_us_however_it_comes(tmp_path):
    """By whichever module of ours comes first, registered twice, and by a LAVIS that imports its parts in another order."""
    files: list[Path] = []
    for room in ("models", "tasks", "runners", "datasets"):
        here = sorted((ROOT / "lavis_mafa" / room).rglob("*.py"))
        all_alike = here[0].read_text().startswith("import lavis ")  # a room's __init__ comes before each of its modules
        files += here[:2] if all_alike else here
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    asked = ("load_model('albef_mafa', 'tiny')", *["registry.get_model_class('albef_mafa').from_config"] * 7)  # one of eight builds
    codes = {name: f"as_tools_do({name!r}){LAVIS_KNOWS_US}{asked[number % 8]}" for number, name in enumerate(names)}
    codes |= {"twice": TWICE, "another order": another_order(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_CHILDREN],
        env={**os.environ, "LAVIS_MAFA_AUTOLOAD": "0"},
        input=json.dumps(codes),
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [f"fine {name}" for name in codes], done.stdout + done.stderr
