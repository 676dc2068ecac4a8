"""``lavis-mafa evaluate RUN``, the best checkpoint of a run as it was trained; or ``--cfg-path X.yaml``, without training."""

from __future__ import annotations

import argparse
from pathlib import Path

from lavis_mafa.cli.train import add_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    text = "folder of a run: its best checkpoint, else its last, with its own settings, on its test splits, else those it validated on"
    what.add_argument("folder", nargs="?", type=Path, metavar="RUN", help=text)
    what.add_argument("--cfg-path", metavar="YAML", help="or this: a file, or a name that `lavis-mafa ls` shows")
    add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    from lavis_mafa.runners.train import evaluate

    evaluate(arguments.cfg_path if arguments.folder is None else arguments.folder, arguments.options)
    return 0
