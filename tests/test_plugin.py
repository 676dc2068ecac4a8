"""The plugin is found without an import of ours, and behaves when it is switched off, doubled, or alone."""

from __future__ import annotations

import os
import subprocess
import sys


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], env={**os.environ, **env}, capture_output=True, text=True)


def test_load_model_needs_no_import_of_ours():
    done = python("from lavis.models import load_model; print(type(load_model('albef_mafa', 'tiny')).__name__)")
    assert done.stdout.split()[-1:] == ["AlbefMafa"], done.stderr


def test_lavis_before_torch_and_torch_before_lavis():
    check = "from lavis.common.registry import registry as r; print(r.get_task_class('mafa_pretrain'))"
    for first in ("import torch; import lavis", "import lavis", "import lavis.tasks, torch"):
        done = python(f"{first}; {check}")
        assert "MafaPretrainTask" in done.stdout, (first, done.stderr)


def test_autoload_can_be_switched_off():
    done = python(
        "import lavis; from lavis.common.registry import registry as r; print(r.get_model_class('albef_mafa'))",
        LAVIS_MAFA_AUTOLOAD="0",
    )
    assert done.stdout.split()[-1] == "None", done.stderr


def test_registering_twice_is_harmless():
    code = (
        "import lavis, importlib, lavis_mafa.plugin as p; p.register(); p.register(); importlib.reload(p).register();"
        "from lavis.common.registry import registry as r; print('albef_mafa' in r.list_models())"
    )
    assert python(code).stdout.split()[-1] == "True"


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
