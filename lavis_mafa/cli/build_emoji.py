"""``lavis-mafa build-emoji data/emoji``: the embedded data, from installed packages alone."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="where to build; it must not hold anything else")
    parser.add_argument("--size", type=int, default=72, help="pixels per side (default 72)")
    parser.add_argument("--seed", type=int, default=0, help="of captions and splits (default 0)")


def run(arguments: argparse.Namespace) -> int:
    from lavis_mafa.datasets.emoji import build_emoji

    print(build_emoji(arguments.folder, size=arguments.size, seed=arguments.seed))
    return 0
