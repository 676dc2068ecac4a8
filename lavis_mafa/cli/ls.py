"""``lavis-mafa ls``: the project YAMLs, with the first line of each."""

from __future__ import annotations

import argparse

from lavis_mafa.common.projects import project_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("part", nargs="?", default="", help="show only names that contain this")


def run(arguments: argparse.Namespace) -> int:
    for name, path in project_files().items():
        if arguments.part in name:
            first = path.read_text().splitlines()[0].lstrip("# ")
            print(f"{name:45s} {first}")
    return 0
