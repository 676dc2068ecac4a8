"""The lower rooms and our vision transformers stay pure: torch, the standard library and themselves."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lavis_mafa

PACKAGE = Path(lavis_mafa.__file__).parent
ROOMS = ("objectives", "grit")
FILES = [PACKAGE / "models" / "vit.py", *(path for room in ROOMS for path in sorted((PACKAGE / room).glob("**/*.py")))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_torch_the_standard_library_and_these_rooms_only(path):
    imported = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported.append("lavis_mafa.objectives" if node.level else node.module)
    for name in imported:
        own = any(f"{name}.".startswith(f"lavis_mafa.{room}.") for room in ROOMS)
        assert own or name.split(".")[0] in {"torch", *sys.stdlib_module_names}, f"{path.name} imports {name}"


def test_importing_them_imports_no_host_library():
    code = (
        "import sys, lavis_mafa.objectives, lavis_mafa.grit\n"
        "print([name for name in ('lavis', 'transformers', 'timm', 'omegaconf') if name in sys.modules])"
    )
    environment = {**os.environ, "LAVIS_MAFA_AUTOLOAD": "0", "PYTHONPATH": str(PACKAGE.parent)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
