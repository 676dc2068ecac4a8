"""``lavis-mafa validate YAML ...``: what ``train`` and ``evaluate`` would refuse, all of it at once, without starting anything."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("yaml", nargs="+", help="files, or names that `lavis-mafa ls` shows")
    parser.add_argument(
        "--no-files",
        action="store_true",
        help="look at the YAML alone: its data, checkpoints and GPUs are another machine's, or its checkpoints not set yet",
    )
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override settings of all of them")


def run(arguments: argparse.Namespace) -> int:
    from lavis_mafa.runners.job import all_mistakes

    wrong = 0
    for name in arguments.yaml:
        mistakes = all_mistakes(name, arguments.options, files=not arguments.no_files)
        wrong += bool(mistakes)
        for mistake in mistakes:
            print(f"{name}: {mistake}", file=sys.stderr)
        if not mistakes:
            print(f"{name}: fine")
    return 2 if wrong else 0
