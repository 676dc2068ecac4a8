"""``lavis-mafa validate YAML ...``: what ``train`` would refuse, without starting anything."""

from __future__ import annotations

import argparse
import sys

from lavis_mafa.common.errors import UserError
from lavis_mafa.common.job import check_yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("yaml", nargs="+", help="files, or names that `lavis-mafa ls` shows")
    parser.add_argument("--no-files", action="store_true", help="do not ask for checkpoints that are not set or not on this machine")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE")


def run(arguments: argparse.Namespace) -> int:
    wrong = 0
    for name in arguments.yaml:
        try:
            check_yaml(name, arguments.options, files=not arguments.no_files)
            print(f"{name}: fine")
        except UserError as error:
            wrong += 1
            print(f"{name}: {error}", file=sys.stderr)
    return 2 if wrong else 0
