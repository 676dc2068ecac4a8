"""``lavis-mafa ls``: the project YAMLs, with the first line of each."""

from __future__ import annotations

import argparse

from lavis_mafa.config.read import project_files
from lavis_mafa.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("part", nargs="?", default="", help="show only names that contain this")


def run(arguments: argparse.Namespace) -> int:
    files = {name: path for name, path in project_files().items() if arguments.part in name}
    if not files:
        raise UserError(f"no YAML has {arguments.part!r} in its name; `lavis-mafa ls` shows all.")
    for name, path in files.items():
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        print(f"{name:45s} {first}")
    return 0
