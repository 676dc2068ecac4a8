"""``lavis-mafa evaluate --cfg-path X.yaml``: the same YAML, without training."""

from __future__ import annotations

import argparse

from lavis_mafa.cli.train import add_yaml_arguments as add_arguments
from lavis_mafa.errors import UserError

__all__ = ["add_arguments", "run"]


def run(arguments: argparse.Namespace) -> int:
    from lavis_mafa.runners.job import run_job

    for option in arguments.options:
        if option.startswith("run.evaluate=") and option != "run.evaluate=true":
            raise UserError(f"--options has {option}, but this command evaluates; `lavis-mafa train` trains.")
    run_job(arguments.cfg_path, [*arguments.options, "run.evaluate=true"])
    return 0
