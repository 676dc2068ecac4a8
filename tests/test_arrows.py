"""The plan of the house holds: arrows point down, no circle, and not more modules than a reader can keep in mind."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import lavis_mafa

PACKAGE = Path(lavis_mafa.__file__).parent
# from the top: a room imports what stands below it, or beside it
FLOORS = (
    ("__main__",),
    ("cli",),
    ("api",),
    ("tools",),
    ("runners", "plugin"),
    ("tasks",),
    ("models", "datasets", "processors"),
    ("config",),
    ("objectives", "grit"),
    ("named_weights", "weights", "progress", "distributed", "files", "signals", "errors"),
    ("__init__",),
)
FLOOR = {room: -number for number, rooms in enumerate(FLOORS) for room in rooms}


def module_name(path: Path) -> str:
    """``lavis_mafa/models/base.py`` is ``models.base``, a package's file the package, and the first of all ``__init__``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"


FILES = {module_name(path): path for path in PACKAGE.rglob("*.py") if "projects" not in path.parts}


def named(node: ast.AST) -> list[str]:
    """What an import statement may mean, without ``lavis_mafa.``: of ``from a import b`` the module a.b, or else a."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "imports are written out"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return []
    return [name.partition(".")[2] or "__init__" for name in names if name.split(".")[0] == "lavis_mafa"]


def imports(path: Path) -> set[str]:
    """The modules that a file imports anywhere: at its top, in a function, for its types."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for name in named(node):
            target = name if name in FILES else name.rpartition(".")[0] or "__init__"
            assert target in FILES, f"{path}:{node.lineno}: lavis_mafa.{name}"
            found.add(target)
    return found


IMPORTS = {module: imports(path) for module, path in FILES.items()}


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_module_is_in_a_room():
    assert not {room(module) for module in FILES} - FLOOR.keys()


def test_arrows_point_down():
    up = [f"{module} -> {target}" for module in FILES for target in IMPORTS[module] if FLOOR[room(target)] > FLOOR[room(module)]]
    assert not sorted(up)


def test_there_is_no_circle():
    """Modules that import none of those left, or that none of them imports, are taken away again and again: circles stay."""
    left = {module: targets - {module} for module, targets in IMPORTS.items()}
    while True:
        imported = set().union(*left.values())
        kept = {module for module, targets in left.items() if targets and module in imported}
        if kept == left.keys():
            break
        left = {module: left[module] & kept for module in kept}
    assert not {module: sorted(targets) for module, targets in sorted(left.items())}


def test_a_newcomer_can_hold_it_in_mind():
    importers = Counter(target for targets in IMPORTS.values() for target in targets)
    alone = sorted(module for module, count in importers.items() if count == 1)
    assert len(FILES) <= 193
    assert len(alone) < 45, alone
