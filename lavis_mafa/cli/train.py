"""``lavis-mafa train --cfg-path X.yaml [--options a.b=c ...]``, also under torchrun."""

from __future__ import annotations

import argparse

from lavis_mafa.common.job import run_job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cfg-path", required=True, metavar="YAML", help="a file, or a name that `lavis-mafa ls` shows")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override settings, e.g. run.max_epoch=1")


def run(arguments: argparse.Namespace) -> int:
    run_job(arguments.cfg_path, arguments.options)
    return 0
