"""``lavis-mafa cp mafa/albef/train/pretrain.yaml .``: a copy to edit; nothing is overwritten."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from lavis_mafa.config.read import find_yaml
from lavis_mafa.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="as `lavis-mafa ls` shows it")
    parser.add_argument("target", help="a folder or a file name")


def run(arguments: argparse.Namespace) -> int:
    source, target = find_yaml(arguments.name), Path(arguments.target)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise UserError(f"{target} exists already and is not overwritten; give another name.")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}.") from error
    print(target)
    return 0
