"""``lavis-mafa evaluate --cfg-path X.yaml``: the same YAML, without training."""

from __future__ import annotations

import argparse

from lavis_mafa.cli.train import add_arguments as add_arguments
from lavis_mafa.common.job import run_job


def run(arguments: argparse.Namespace) -> int:
    run_job(arguments.cfg_path, [*arguments.options, "run.evaluate=true"])
    return 0
