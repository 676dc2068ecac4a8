"""``lavis-mafa train --cfg-path X.yaml [--options a.b=c ...]``, also under torchrun."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_yaml_arguments(parser)
    parser.add_argument(
        "--resume",
        metavar="auto|RUN",
        help="auto: go on, in its folder, with the newest good checkpoint of a run of these settings, or start one; "
        "a file, or a run's folder: go on from it in a new folder",
    )


def add_yaml_arguments(parser: argparse.ArgumentParser) -> None:
    """``--cfg-path`` and ``--options``."""
    parser.add_argument("--cfg-path", required=True, metavar="YAML", help="a file, or a name that `lavis-mafa ls` shows")
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """``--options``."""
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override settings, e.g. run.max_epoch=1")


def run(arguments: argparse.Namespace) -> int:
    from lavis_mafa.runners.train import train

    train(arguments.cfg_path, arguments.options, arguments.resume, _page)
    return 0


def _page(run: Path) -> Path:
    from lavis_mafa.tools.report import write_run_page  # here: it needs matplotlib and scipy, and not every run has a page

    return write_run_page(run)
