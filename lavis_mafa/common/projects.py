"""Where our YAMLs are: ``projects/`` of a checkout, or the copy inside the installed package."""

from __future__ import annotations

from pathlib import Path

from lavis_mafa.common.errors import UserError, did_you_mean
from lavis_mafa.common.paths import expanded


def projects_root() -> Path:
    package = Path(__file__).resolve().parents[1]
    inside = package / "projects"
    return inside if inside.is_dir() else package.parent / "projects"


def project_files() -> dict[str, Path]:
    """Every shipped YAML by its name below ``projects/``, sorted."""
    root = projects_root()
    return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find_yaml(name: str) -> Path:
    """A file of the user's, or one of ours by name.

    Raises:
        UserError: neither; the message names the nearest of ours.
    """
    path = Path(expanded(name, "the YAML"))
    if path.is_file():
        return path
    files = project_files()
    if name in files:
        return files[name]
    raise UserError(f"{name!r} is no file and none of the shipped YAMLs.{did_you_mean(name, files)} See `lavis-mafa ls`.")
