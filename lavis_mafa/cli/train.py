"""``lavis-mafa train --cfg-path X.yaml [--options a.b=c ...]``, also under torchrun."""

from __future__ import annotations

import argparse

from lavis_mafa.common.job import run_job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cfg-path", required=True, metavar="YAML", help="a file, or a name that `lavis-mafa ls` shows")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override settings, e.g. run.max_epoch=1")
    parser.add_argument(
        "--resume",
        metavar="auto|CHECKPOINT",
        help="auto: go on, in its folder, with the newest good checkpoint of a run of these settings, or start one; "
        "a file: go on from it in a new folder",
    )


def run(arguments: argparse.Namespace) -> int:
    resume = [] if arguments.resume is None else [f"run.resume_ckpt_path={arguments.resume}"]
    run_job(arguments.cfg_path, [*arguments.options, *resume])
    return 0
