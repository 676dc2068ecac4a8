"""``lavis-mafa``: one sub-command a file. A user's mistake is one message and exit code 2; ctrl-C is 130."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from lavis_mafa import __version__
from lavis_mafa.common.errors import UserError

COMMANDS = {
    "train": "pre-train or fine-tune from a YAML (same flags as LAVIS's train.py)",
    "evaluate": "evaluate from a YAML, without training",
    "quickstart": "train Con-D, GRIT and MAFA on emoji and show what was found",
    "build-emoji": "build the embedded emoji data into a folder",
    "validate": "check YAMLs without running them",
    "ls": "list the project YAMLs that come with this package",
    "cp": "copy one of them to edit it",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    # threads that wait by spinning take the cores from the data loader: ten times slower on a busy two-core machine
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    parser = argparse.ArgumentParser(prog="lavis-mafa", description="MAFA for LAVIS: manage false negatives in pre-training.")
    parser.add_argument("--version", action="version", version=f"lavis-mafa {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    argv = sys.argv[1:] if argv is None else argv
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        # only the asked command's module is imported: `lavis-mafa ls` must not wait for torch
        if argv[:1] == [name]:
            module = importlib.import_module(f"lavis_mafa.cli.{name.replace('-', '_')}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except UserError as error:
        print(f"lavis-mafa {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"lavis-mafa {arguments.command}: stopped; what was saved before is kept.", file=sys.stderr)
        return 130
